// Ranks, ties and the hardest negative of every row, by mma.sync. Training does not ask for them.
#pragma once

#include "mma.cuh"

namespace fastnce::cuda {

// Those of one row. A t that is nan is never the largest, and is not <= a bound.
struct Ranking {
  float best, best_pos, low, high;
  int above, ties, where;

  FASTNCE_DEVICE void see(float t, int j, bool negative, bool positive) {
    if (positive) best_pos = larger(best_pos, t);
    if (!negative) return;
    above += !(t <= high);
    ties += t >= low && t <= high;
    // `>`: of equal negatives the one in the lowest column stays, because columns come in ascending order.
    if (t > best) {
      best = t;
      where = j;
    }
  }

  FASTNCE_DEVICE void merge_quad() {
    above = quad_sum(above);
    ties = quad_sum(ties);
    best_pos = over_quad(best_pos, [](float a, float b) { return larger(a, b); });
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const float other = shuffle_xor(best, mask);
      const int at = shuffle_xor(where, mask);
      const bool first = other > best || (other == best && other > -infinity() && at < where);
      best = first ? other : best;
      where = first ? at : where;
    }
  }
};

template <class S>
FASTNCE_KERNEL(THREADS, 1)
retrieval(const Problem p, const Grid grid, const Retrieval out) {
  const Rules& r = p.rules;
  const int block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * S::BM;
  const Range tiles = split_range(split, grid.per_split, ceil_div(r.columns, S::BN));
  Rows rows[S::MT];
  load_strips<S>(rows, p, i0, valid(p.scale) * LOG2E);
  Ranking found[S::MT][2];
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = rows[mt].i[h] < r.rows;
      const float* bounds = out.bounds + rows[mt].i[h];
      found[mt][h] = {-infinity(), -infinity(), inside ? bounds[0] : 0.0f, inside ? bounds[r.rows] : 0.0f, 0, 0, -1};
    }
  for_each_tile<S>(
      p, column_vectors<FORWARD_FIELDS<true>>(p, nullptr), shared_memory(), i0, tiles.end - tiles.begin,
      [&](int n) { return (tiles.begin + n) * S::BN; },
      [&](int, int j0, Strip<S::NB>(&c)[S::MT], const Columns<S::BN>& columns, const char*) {
#pragma unroll
        for (int mt = 0; mt < S::MT; ++mt) {
          to_logits<S::NB, true>(c[mt], rows[mt], columns, 1.0f);
          const Kinds kinds = classify<S::NB, true>(r, rows[mt], j0, columns);
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int k = 0; k < 2 * S::NB; ++k)
              found[mt][h].see(c[mt][k / 2][2 * h + k % 2], j0 + k / 2 * 8 + fragment_column(thread_index() % 32, k % 2),
                               has(kinds.negative[h], k), has(kinds.positive[h], k));
        }
      },
      [](int, int) {});
  const int64_t field = static_cast<int64_t>(grid.splits) * r.rows;
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Ranking& row = found[mt][h];
      row.merge_quad();
      if (!first_of_quad() || rows[mt].i[h] >= r.rows) continue;
      const int64_t at = static_cast<int64_t>(split) * r.rows + rows[mt].i[h];
      out.largest[at] = row.best;
      out.largest[at + field] = row.best_pos;
      out.counts[at] = row.above;
      out.counts[at + field] = row.ties;
      out.counts[at + 2 * field] = row.where;
    }
}

}  // namespace fastnce::cuda
