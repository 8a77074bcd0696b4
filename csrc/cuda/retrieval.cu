#include "forms.cuh"
#include "retrieval.cuh"

namespace fastnce::cuda {

void retrieval(const Problem& p, const Grid& grid, const Retrieval& out, Stream stream) {
  with_form<Kernel::RETRIEVAL, true>(p, [&](auto form) {
    using S = decltype(form);
    launch(retrieval<S>, programs(p, grid, S::BM), THREADS, Shared<S, FORWARD_FIELDS<true>>::BYTES, stream, p, grid, out);
  });
}

}  // namespace fastnce::cuda
