#include "backward.cuh"
#include "forms.cuh"

namespace fastnce::cuda {

void weights_block(const Problem& p, const Weights& weights, const Block& out, Stream stream) {
  with_form_and_rules<Kernel::WEIGHTS_BLOCK>(p, [&](auto form, auto content) {
    using S = decltype(form);
    const int64_t blocks = static_cast<int64_t>(out.down) * out.across;
    launch(weights_block<S, content.value>, blocks, THREADS, Shared<S, BACKWARD_FIELDS<content.value>>::BYTES, stream, p, weights, out);
  });
}

}  // namespace fastnce::cuda
