// Sums over many tiles, in registers, and how they are stored: statistics of rows, sums of rows and columns, the gradient of rows. Both
// families of kernels, mma.sync and wgmma, use them.
#pragma once

#include "tile.cuh"

namespace fastnce::cuda {

// The sums of a row, with a running maximum, over one split of its columns.
struct RowAccumulator {
  LogSum negative, positive;
  float pos = 0.0f;  // sum of t over the positives
  int n_pos = 0;

  template <int NB>
  FASTNCE_DEVICE void add(const Strip<NB>& t, int h, const Kinds& kinds) {
    negative.add<NB>(t, h, kinds.negative[h]);
    const uint32_t pairs = kinds.positive[h];
    if (!pairs) return;
    positive.add<NB>(t, h, pairs);
#pragma unroll
    for (int c = 0; c < 2 * NB; ++c) pos += has(pairs, c) ? t[c / 2][2 * h + c % 2] : 0.0f;
    n_pos += population(pairs);
  }

  // One lane of a quad writes a row. All lanes of the quad must come here.
  template <bool CONTENT>
  FASTNCE_DEVICE void store(const Rules& r, const Grid& grid, const RowSums& out, int split, int i) {
    negative.merge_quad();
    const int64_t field = static_cast<int64_t>(grid.splits) * r.rows, at = static_cast<int64_t>(split) * r.rows + i;
    const bool writes = first_of_quad() && i < r.rows;
    if (writes) {
      out.sums[at] = negative.top;
      out.sums[at + field] = negative.total;
    }
    if (!CONTENT || !r.in_tile) return;
    positive.merge_quad();
    const float all_pos = quad_sum(pos);
    const int all_n_pos = quad_sum(n_pos);
    if (writes) {
      out.sums[at + 2 * field] = positive.top;
      out.sums[at + 3 * field] = positive.total;
      out.sums[at + 4 * field] = all_pos;
      out.count[at] = all_n_pos;
    }
  }
};

// The number of sums of a column: of the terms of the negatives; with ids also over the positives, of their t, and their number.
template <bool CONTENT>
constexpr int BOTH_SUMS = CONTENT ? 4 : 1;

// Sums the 2 NB columns of every thread over the rows of its warp, and stores each sum, by one lane, at(column). All lanes must come here.
template <int NB, class At>
FASTNCE_DEVICE void store_columns(float (&sums)[2 * NB], const At& at) {
  const int lane = thread_index() % 32;
  scatter_sums<NB>(sums);
#pragma unroll
  for (int k = 0; k < NB / 4; ++k) {
    const int c = scattered_first(lane, 2 * NB) + k;
    at(c / 2 * 8 + fragment_column(lane, c % 2)) = sums[k];
  }
}

// The sums of a thread's two rows, of terms without a base.
struct BothAccumulator {
  float total[2] = {}, total_pos[2] = {}, pos[2] = {};
  int n_pos[2] = {};

  // Adds the pairs with negative(h, c) to the rows, and to by_column.
  template <int NB, class Negative>
  FASTNCE_DEVICE void add(const Strip<NB>& t, const Negative& negative, float (&by_column)[2 * NB]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int c = 0; c < 2 * NB; ++c) {
        const float e = negative(h, c) ? term(t[c / 2][2 * h + c % 2]) : 0.0f;
        total[h] += e;
        by_column[c] += e;
      }
  }

  // Adds the positives, of which most strips have none, to the rows, and stores their sums by column at(1..3, column). All lanes must come
  // here.
  template <int NB, class At>
  FASTNCE_DEVICE void add_positives(const Strip<NB>& t, const Kinds& kinds, const At& at) {
    const bool some = any_lane(kinds.positive[0] | kinds.positive[1]);
#pragma unroll
    for (int which = 1; which < BOTH_SUMS<true>; ++which) {
      float by_column[2 * NB] = {};
      if (some)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int c = 0; c < 2 * NB; ++c) {
            if (!has(kinds.positive[h], c)) continue;
            const float s = t[c / 2][2 * h + c % 2], value = which == 1 ? term(s) : which == 2 ? s : 1.0f;
            by_column[c] += value;
            if (which == 1) total_pos[h] += value;
            if (which == 2) pos[h] += value;
          }
      store_columns<NB>(by_column, [&](int column) -> float& { return at(which, column); });
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) n_pos[h] += population(kinds.positive[h]);
  }

  // Adds the rows to memory. All lanes of a quad must come here.
  template <bool CONTENT>
  FASTNCE_DEVICE void store(const Rules& r, const BothSums& out, const Rows& rows) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = rows.i[h];
      const bool writes = first_of_quad() && i < r.rows;
      const float all = quad_sum(total[h]);
      if (writes) atomic_add(out.row + i, all);
      if (!CONTENT || !r.in_tile) continue;
      const float all_total_pos = quad_sum(total_pos[h]), all_pos = quad_sum(pos[h]);
      const int found = quad_sum(n_pos[h]);
      if (!writes || !found) continue;
      atomic_add(out.row + r.rows + i, all_total_pos);
      atomic_add(out.row + 2 * static_cast<int64_t>(r.rows) + i, all_pos);
      atomic_add(out.row_count + i, found);
    }
  }
};

// Adds the sums of a column to memory. over(which) is one of them, over all warps of the block.
template <bool CONTENT, class Over>
FASTNCE_DEVICE void add_column(const Rules& r, const BothSums& out, int j, const Over& over) {
  atomic_add(out.column + j, over(0));
  if constexpr (CONTENT) {
    const int found = static_cast<int>(over(3));
    if (!r.in_tile || !found) return;
    atomic_add(out.column + r.columns + j, over(1));
    atomic_add(out.column + 2 * static_cast<int64_t>(r.columns) + j, over(2));
    atomic_add(out.column_count + j, found);
  }
}

// Stores the gradient, and the moment, of a thread's two rows in a strip that starts at row `first`, over one split of the columns.
template <int NB>
FASTNCE_DEVICE void store_gradient(const Problem& p, const RowGradient& out, int split, int first, const Strip<NB>& dx,
                                   const float (&moment)[2]) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = first + fragment_row(lane, 2 * h);
    float* to = out.dx + (static_cast<int64_t>(split) * p.row_padded + i) * (NB * 8);
#pragma unroll
    for (int d = 0; d < NB; ++d)
#pragma unroll
      for (int e = 0; e < 2; ++e) to[d * 8 + fragment_column(lane, e)] = dx[d][2 * h + e];
    if (!out.moment) continue;
    const float all = quad_sum(moment[h]);
    if (first_of_quad() && i < p.rules.rows) out.moment[static_cast<int64_t>(split) * p.rules.rows + i] = all;
  }
}

}  // namespace fastnce::cuda
