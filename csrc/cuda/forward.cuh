// Statistics by mma.sync: of rows, and of rows and columns from the same tiles.
#pragma once

#include "accumulate.cuh"
#include "mma.cuh"

namespace fastnce::cuda {

// Row statistics with a running maximum, for logits of any size.
template <class S, bool CONTENT>
FASTNCE_KERNEL(THREADS, 1)
forward_rows(const Problem p, const Grid grid, const RowSums out) {
  const Rules& r = p.rules;
  const int block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * S::BM;
  Range tiles = split_range(split, grid.per_split, ceil_div(r.columns, S::BN));
  if (*p.bound <= UNSHIFTED && !out.always) tiles.end = tiles.begin;
  const float largest = valid(p.scale) * LOG2E;
  Rows rows[S::MT];
  load_strips<S>(rows, p, i0, 1.0f);
  RowAccumulator accumulator[S::MT][2];
  for_each_tile<S>(
      p, column_vectors<FORWARD_FIELDS<CONTENT>>(p, nullptr), shared_memory(), i0, tiles.end - tiles.begin,
      [&](int n) { return (tiles.begin + n) * S::BN; },
      [&](int, int j0, Strip<S::NB>(&c)[S::MT], const Columns<S::BN>& columns, const char*) {
#pragma unroll
        for (int mt = 0; mt < S::MT; ++mt) {
          to_logits<S::NB, false>(c[mt], rows[mt], columns, largest);
          const Kinds kinds = kinds_of<S::NB, CONTENT>(r, rows[mt], i0, S::BM, j0, columns);
#pragma unroll
          for (int h = 0; h < 2; ++h) accumulator[mt][h].template add<S::NB>(c[mt], h, kinds);
        }
      },
      [](int, int) {});
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) accumulator[mt][h].template store<CONTENT>(r, grid, out, split, rows[mt].i[h]);
}

// Shared memory of forward_both: sums of the columns of a tile, per warp.
template <class S, bool CONTENT>
constexpr size_t both_bytes() {
  return Shared<S, FORWARD_FIELDS<CONTENT>>::BYTES + BOTH_SUMS<CONTENT> * WARPS * S::BN * sizeof(float);
}

// Sums of rows and of columns from the same tiles, added in memory. It runs where every |logit| <= 40: no maximum is needed. Tiles are
// BM x BM: where the keys are the queries, a tile also stands for its mirror image, and half of them are visited.
template <class S, bool CONTENT>
FASTNCE_KERNEL(THREADS, 1)
forward_both(const Problem p, const Grid grid, const BothSums out) {
  constexpr int PARTS_OF_TILE = S::BM / S::BN, FIELDS = FORWARD_FIELDS<CONTENT>;
  const Rules& r = p.rules;
  const int block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * S::BM;
  const int across = ceil_div(r.columns, S::BM);
  const Range steps = split_range(split, grid.per_split, out.symmetric ? circle_steps(block, across) : across);
  if (!(*p.bound <= UNSHIFTED)) return;
  float* by_warp = reinterpret_cast<float*>(shared_memory() + Shared<S, FIELDS>::BYTES);
  const auto place = [&](int which, int warp, int column) -> float& { return by_warp[(which * WARPS + warp) * S::BN + column]; };
  // Where the keys are the queries, a tile on the diagonal holds its own mirror image: it adds to rows alone.
  const auto counts_columns = [&](int n) { return !(out.symmetric && steps.begin + n / PARTS_OF_TILE == 0); };
  Rows rows[S::MT];
  constexpr bool QUICK = S::PARTS == 1;
  const float largest = valid(p.scale) * LOG2E;
  load_strips<S>(rows, p, i0, QUICK ? largest : 1.0f);
  BothAccumulator accumulator[S::MT];
  for_each_tile<S>(
      p, column_vectors<FIELDS>(p, nullptr), shared_memory(), i0, (steps.end - steps.begin) * PARTS_OF_TILE,
      [&](int n) { return circle_block(block % across, steps.begin + n / PARTS_OF_TILE, across) * S::BM + n % PARTS_OF_TILE * S::BN; },
      [&](int, int j0, Strip<S::NB>(&c)[S::MT], const Columns<S::BN>& columns, const char*) {
        const auto at = [&](int which, int column) -> float& { return place(which, thread_index() / 32, column); };
        float by_column[2 * S::NB] = {};
#pragma unroll
        for (int mt = 0; mt < S::MT; ++mt) {
          to_logits<S::NB, QUICK>(c[mt], rows[mt], columns, largest);
          const Kinds kinds = kinds_of<S::NB, CONTENT>(r, rows[mt], i0, S::BM, j0, columns);
          accumulator[mt].template add<S::NB>(c[mt], [&](int h, int k) { return has(kinds.negative[h], k); }, by_column);
          static_assert(!CONTENT || S::MT == 1);
          if constexpr (CONTENT) accumulator[mt].template add_positives<S::NB>(c[mt], kinds, at);
        }
        store_columns<S::NB>(by_column, [&](int column) -> float& { return at(0, column); });
      },
      [&](int n, int j0) {
        const int column = thread_index(), j = j0 + column;
        if (column >= S::BN || j >= r.columns || !counts_columns(n)) return;
        add_column<CONTENT>(r, out, j, [&](int which) {
          float sum = 0.0f;
          for (int warp = 0; warp < WARPS; ++warp) sum += place(which, warp, column);
          return sum;
        });
      });
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) accumulator[mt].template store<CONTENT>(r, out, rows[mt]);
}

}  // namespace fastnce::cuda
