#include <algorithm>

#include "launch.cuh"
#include "vectors.cuh"

namespace fastnce::cuda {

// Up to this many rows one block is faster than two launches of many.
constexpr int ROWS_OF_ONE_BLOCK = 2048;

static int blocks_of(const Contributions& c) {
  const int rows = std::max(c.factors[0], c.factors[1]);
  // At most as many blocks as a block has threads: in the second launch a thread reads the sums of one.
  return rows <= ROWS_OF_ONE_BLOCK ? 1 : std::min(ceil_div(rows, SUM_THREADS), SUM_THREADS);
}

static int64_t blocks_over(int64_t rows) { return (rows + VECTOR_THREADS - 1) / VECTOR_THREADS; }

constexpr size_t sum_bytes(int sums) { return sums * SUM_WARPS * sizeof(double); }

int64_t scratch_of(const Contributions& c) { return blocks_of(c) == 1 ? 0 : blocks_of(c) * QUANTITIES; }

void statistics(const Statistics& s, Stream stream) { launch(statistics_kernel, blocks_over(s.rows), VECTOR_THREADS, 0, stream, s); }

void coefficients(const Contributions& c, double* scratch, Stream stream) {
  const int blocks = blocks_of(c);
  const auto run = [&](auto kernel) { launch(kernel, blocks, SUM_THREADS, sum_bytes(QUANTITIES), stream, c, scratch); };
  if (blocks == 1) return run(coefficients_kernel<Phase::AT_ONCE>);
  run(coefficients_kernel<Phase::SUMS>);
  run(coefficients_kernel<Phase::VECTORS>);
}

void scale_gradient(const ScaleGradient& g, Stream stream) { launch(scale_gradient_kernel, 1, SUM_THREADS, sum_bytes(1), stream, g); }

}  // namespace fastnce::cuda
