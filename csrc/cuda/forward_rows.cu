#include "forms.cuh"
#include "forward.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void forward_rows(const Problem& p, const Grid& grid, const RowSums& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_forward_rows(p, grid, out, stream);
  with_form_and_rules<Kernel::FORWARD_ROWS>(p, [&](auto form, auto content) {
    using S = decltype(form);
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.rules.rows, S::BM)) * grid.splits;
    launch(forward_rows<S, content.value>, blocks, THREADS, Shared<S, FORWARD_FIELDS<content.value>>::BYTES, stream, p, grid, out);
  });
}

}  // namespace fastnce::cuda
