#include "backward.cuh"
#include "forms.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void backward_rows(const Problem& p, const Grid& grid, const Weights& weights, const RowGradient& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_backward_rows(p, grid, weights, out, stream);
  with_form_and_rules<Kernel::BACKWARD_ROWS>(p, [&](auto form, auto content) {
    using S = decltype(form);
    launch(backward_rows<S, content.value>, programs(p, grid, S::BM), THREADS, Shared<S, BACKWARD_FIELDS<content.value>>::BYTES, stream, p,
           grid, weights, out);
  });
}

}  // namespace fastnce::cuda
