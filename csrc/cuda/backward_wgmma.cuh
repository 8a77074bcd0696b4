// The gradient for sm_90a. While the weights of one tile are multiplied with its rows, the weights of the next tile are computed.
#pragma once

#include "accumulate.cuh"
#include "wgmma_walk.cuh"

namespace fastnce::cuda {

// Weights times beta as the left operand of the product with y~.
template <class W>
FASTNCE_DEVICE void to_operand(uint32_t (&g)[W::BN / 16][4], const Strip<W::NB>& w, const Columns<W::BN>& columns) {
#pragma unroll
  for (int nb = 0; nb < W::NB; ++nb) {
    float beta[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) beta[e] = finite(columns.value(BETA, nb * 8 + fragment_column(thread_index() % 32, e)));
#pragma unroll
    for (int h = 0; h < 2; ++h) g[nb / 2][nb % 2 * 2 + h] = to_half2(w[nb][2 * h] * beta[0], w[nb][2 * h + 1] * beta[1]);
  }
}

// TERMS: of the weights of every tile, where pairs are told apart by index.
template <class W, class TERMS>
FASTNCE_KERNEL(WGMMA_THREADS, 1)
wgmma_backward_rows(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap y_map, const Problem p, const Grid grid,
                    const Weights weights, const RowGradient out) {
  const Rules& r = p.rules;
  auto weigher = Weigher<W::CONTENT, 1>::load(p, weights);
  // Weights of rows and columns have two kernels, with one exponential and with two. Both are launched, and the range of the logits decides
  // here which of them runs.
  if (!weigher.serves(TERMS{})) return;
  const int warp = thread_index() / 32, block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * W::BM;
  const W walk{shared_memory()};
  walk.start(r, split_range(split, grid.per_split, ceil_div(r.columns, W::BN)), W::CONTENT, i0, false, 0);
  const auto column_of = [&](int n) { return walk.order().at(n) * W::BN; };
  if (warp < PRODUCER_WARPS) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp == 0) walk.bring_tiles(&x_map, &y_map, i0, column_of);
    if (warp == 1) walk.bring_vectors(column_vectors<W::FIELDS>(p, weights.column), weigher.one_exponential, column_of);
    return;
  }
  take_registers<CONSUMER_REGISTERS>();
  const int first = i0 + consumer_row(warp);
  Rows rows = Rows::load(p, first, weigher.row_multiplier());
  weigher.load_rows(p, weights, rows);
  const int count = walk.order().count, plain = walk.order().plain;
  const char* x = walk.x() + warpgroup_row(warp) * GROUP_BYTES;
  Strip<W::DEPTH / 8> dx = {};
  Strip<W::NB> s;
  uint32_t g[W::BN / 16][4];
  float moment[2] = {};
  const auto logits = [&](int n) {
    issue_logits<W::BN, W::DEPTH>(s, x, W::BM, walk.y(n));
    wgmma_commit();
  };
  const auto gradient = [&](int n) {
    issue_gradient<W::DEPTH, W::BN>(dx, g, walk.y(n));
    wgmma_commit();
  };
  const auto weigh_plain = [&](int n) {
    weigher.template weigh<W::NB>(TERMS{}, s, rows, walk.columns(n), Kinds{{all_pairs<W::NB>(), all_pairs<W::NB>()}, {0, 0}}, moment);
  };
  if (count > 0) barrier_wait(walk.x_full(), 0);
  if (!W::CONTENT && plain > 0) {
    walk.vectors().wait_full(0);
    walk.tiles().wait_full(0);
    wgmma_fence();
    logits(0);
    wgmma_wait<0>();
    settle<W::NB>(s);
    weigh_plain(0);
    to_operand<W>(g, s, walk.columns(0));
    walk.vectors().release(0);
    for (int n = 0; n + 1 < plain; ++n) {
      walk.vectors().wait_full(n + 1);
      walk.tiles().wait_full(n + 1);
      wgmma_fence();
      logits(n + 1);
      gradient(n);
      wgmma_wait<1>();
      settle<W::NB>(s);
      weigh_plain(n + 1);
      wgmma_hold(moment[0] + moment[1]);
      wgmma_wait<0>();
      settle<W::DEPTH / 8>(dx);
      walk.tiles().release(n);
      to_operand<W>(g, s, walk.columns(n + 1));
      walk.vectors().release(n + 1);
    }
    wgmma_fence();
    gradient(plain - 1);
    wgmma_wait<0>();
    settle<W::DEPTH / 8>(dx);
    walk.tiles().release(plain - 1);
  }
  for (int n = plain; n < count; ++n) {
    walk.vectors().wait_full(n);
    walk.tiles().wait_full(n);
    wgmma_fence();
    logits(n);
    wgmma_wait<0>();
    settle<W::NB>(s);
    const Columns<W::BN> columns = walk.columns(n);
    // With ids the rows are loaded again for every tile: the products need all registers.
    if (W::CONTENT) {
      rows = Rows::load(p, first, weigher.row_multiplier());
      weigher.load_rows(p, weights, rows);
    }
    weigher.template weigh<W::NB>(TERMS{}, s, rows, columns, classify<W::NB, W::CONTENT>(r, rows, column_of(n), columns), moment);
    to_operand<W>(g, s, columns);
    walk.vectors().release(n);
    wgmma_fence();
    gradient(n);
    wgmma_wait<0>();
    settle<W::DEPTH / 8>(dx);
    walk.tiles().release(n);
  }
  store_gradient(p, out, split, first, dx, moment);
}

}  // namespace fastnce::cuda
