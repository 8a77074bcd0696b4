#include "forms.cuh"
#include "retrieval.cuh"

namespace fastnce::cuda {

void retrieval(const Problem& p, const Grid& grid, const Retrieval& out, Stream stream) {
  with_form<Kernel::RETRIEVAL, true>(p, [&](auto form) {
    using S = decltype(form);
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.rules.rows, S::BM)) * grid.splits;
    launch(retrieval<S>, blocks, THREADS, Shared<S, FORWARD_FIELDS<true>>::BYTES, stream, p, grid, out);
  });
}

}  // namespace fastnce::cuda
