#include "backward.cuh"
#include "forms.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

void backward_rows(const Problem& p, const Grid& grid, const Weights& weights, const RowGradient& out, int family, Stream stream) {
  if (family == WGMMA) return wgmma_backward_rows(p, grid, weights, out, stream);
  with_form_and_rules<Kernel::BACKWARD_ROWS>(p, [&](auto form, auto content) {
    using S = decltype(form);
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.rules.rows, S::BM)) * grid.splits;
    launch(backward_rows<S, content.value>, blocks, THREADS, Shared<S, BACKWARD_FIELDS<content.value>>::BYTES, stream, p, grid, weights,
           out);
  });
}

}  // namespace fastnce::cuda
