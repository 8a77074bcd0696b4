#include "backward_wgmma.cuh"

namespace fastnce::cuda {
namespace {

template <class W, class TERMS>
void run(const Problem& p, const Grid& grid, const Weights& weights, const RowGradient& out, Stream stream) {
  const OperandMaps maps(p, W::BM, W::BN);
  launch(wgmma_backward_rows<W, TERMS>, programs(p, grid, W::BM), WGMMA_THREADS, W::BYTES, stream, maps.x, maps.y, p, grid, weights, out);
}

template <int DEPTH>
void of_depth(const Problem& p, const Grid& grid, const Weights& weights, const RowGradient& out, Stream stream) {
  // With ids nothing overlaps, and one kernel serves all terms.
  if (p.rules.by_content()) return run<Walk<Kernel::BACKWARD_ROWS, DEPTH, true>, AnyTerms>(p, grid, weights, out, stream);
  using W = Walk<Kernel::BACKWARD_ROWS, DEPTH, false>;
  if (weights.of_rows && weights.of_columns) {
    run<W, Terms<true, true, true>>(p, grid, weights, out, stream);
    run<W, Terms<true, true, false>>(p, grid, weights, out, stream);
  } else if (weights.of_rows) {
    run<W, Terms<true, false, false>>(p, grid, weights, out, stream);
  } else {
    run<W, Terms<false, true, false>>(p, grid, weights, out, stream);
  }
}

}  // namespace

void wgmma_backward_rows(const Problem& p, const Grid& grid, const Weights& weights, const RowGradient& out, Stream stream) {
  if (p.depth == 64)
    of_depth<64>(p, grid, weights, out, stream);
  else if (p.depth == 128)
    of_depth<128>(p, grid, weights, out, stream);
  else
    of_depth<256>(p, grid, weights, out, stream);
}

}  // namespace fastnce::cuda
