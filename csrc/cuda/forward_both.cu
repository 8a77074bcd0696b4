#include "forms.cuh"
#include "forward.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void forward_both(const Problem& p, const Grid& grid, const BothSums& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_forward_both(p, grid, out, stream);
  with_form_and_rules<Kernel::FORWARD_BOTH>(p, [&](auto form, auto content) {
    using S = decltype(form);
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.rules.rows, S::BM)) * grid.splits;
    launch(forward_both<S, content.value>, blocks, THREADS, both_bytes<S, content.value>(), stream, p, grid, out);
  });
}

}  // namespace fastnce::cuda
