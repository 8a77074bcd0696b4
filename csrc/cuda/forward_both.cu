#include "forms.cuh"
#include "forward.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void forward_both(const Problem& p, const Grid& grid, const BothSums& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_forward_both(p, grid, out, stream);
  with_form_and_rules<Kernel::FORWARD_BOTH>(p, [&](auto form, auto content) {
    using S = decltype(form);
    launch(forward_both<S, content.value>, programs(p, grid, S::BM), THREADS, both_bytes<S, content.value>(), stream, p, grid, out);
  });
}

}  // namespace fastnce::cuda
