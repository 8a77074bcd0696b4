#include "forms.cuh"
#include "forward.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void forward_rows(const Problem& p, const Grid& grid, const RowSums& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_forward_rows(p, grid, out, stream);
  with_form_and_rules<Kernel::FORWARD_ROWS>(p, [&](auto form, auto content) {
    using S = decltype(form);
    launch(forward_rows<S, content.value>, programs(p, grid, S::BM), THREADS, Shared<S, FORWARD_FIELDS<content.value>>::BYTES, stream, p,
           grid, out);
  });
}

}  // namespace fastnce::cuda
