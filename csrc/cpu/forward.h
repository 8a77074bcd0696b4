// Forward of one block of the logits: terms, and their sums by row and by column. docs/math.md has the formula:
//
//     l_i = sum_j 2^(t_ij - top_i),  and the same by column
#pragma once

#include <cmath>

#include "tile.h"

namespace fastnce::FASTNCE_LEVEL {

// ---------------------------------------------------------------- sums

// Sums of term(t, top): those of a row in the lanes of a vector, or those of as many columns. Without SHIFTED they are of term(t), which
// is given in the place of t.
template <bool SHIFTED>
struct Lanes {
  Vec total, top;

  static Lanes empty() { return {Vec{}, all(NONE)}; }

  // Adds COUNT vectors, `stride` apart, and brings the total to a new top once for all of them.
  template <int COUNT>
  __attribute__((always_inline)) void add(const Vec* t, int stride) {
    if constexpr (SHIFTED) {
      Vec best = top;
      for (int v = 0; v < COUNT; ++v) best = larger(best, t[v * stride]);
      // Where the top is infinite, base 0: inf - inf would be nan. 2^-inf is 0, and a sum with a large 2^t in it is inf or large.
      const Vec base = best - best == Vec{} ? best : Vec{};
      total *= exp2(top - base);
      for (int v = 0; v < COUNT; ++v) total += term(t[v * stride], base);
      top = best;
    } else {
      for (int v = 0; v < COUNT; ++v) total += t[v * stride];
    }
  }
};

// Adds one sum to a running sum in double.
template <bool SHIFTED>
FASTNCE_INLINE void merge(double total, float top, double* sum, float* highest) {
  if constexpr (!SHIFTED) {
    *sum += total;
  } else {
    if (top == NONE) return;
    const float best = std::isnan(top) || top > *highest ? top : *highest;
    const double base = std::isinf(best) ? 0.0 : best;
    const double old = *highest == NONE ? 0.0 : *sum * std::exp2(*highest - base);
    *sum = old + total * std::exp2(top - base);
    *highest = best;
  }
}

// most = max(most, value), nan where either is.
FASTNCE_INLINE void raise(float& most, float value) { most = value <= most || std::isnan(most) ? most : value; }

struct Target {
  double* sum;
  float* top;
};

// Adds a register block to the sums of its rows and, with COLUMNS, of its columns.
template <bool SHIFTED, bool COLUMNS>
FASTNCE_INLINE void add_block(const float* t, int count, Lanes<SHIFTED>* rows, Lanes<SHIFTED>* columns) {
  for (int m = 0; m < count; ++m) {
    Vec line[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      line[v] = load(t + m * NR + v * LANES);
      if constexpr (!SHIFTED) {
        line[v] = term(line[v]);
        if constexpr (COLUMNS) columns[v].total += line[v];
      }
    }
    rows[m].template add<NV>(line, 1);
  }
  if constexpr (SHIFTED && COLUMNS)
    for (int v = 0; v < NV; ++v) {
      Vec line[MR];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) line[m] = m < count ? load(t + m * NR + v * LANES) : all(NONE);
      columns[v].template add<MR>(line, 1);
    }
}

template <bool SHIFTED>
FASTNCE_INLINE void flush_rows(const Lanes<SHIFTED>* rows, Range i, Target into) {
  for (int64_t row = 0; row < i.size(); ++row)
    if constexpr (SHIFTED) {
      for (int lane = 0; lane < LANES; ++lane)
        merge<true>(rows[row].total[lane], rows[row].top[lane], into.sum + i.begin + row, into.top + i.begin + row);
    } else {
      into.sum[i.begin + row] += sum(rows[row].total);
    }
}

template <bool SHIFTED>
FASTNCE_INLINE void flush_columns(const Lanes<SHIFTED>* columns, Range j, Target into) {
  for (int64_t c = 0; c < j.size(); ++c) {
    const Lanes<SHIFTED>& from = columns[c / LANES];
    merge<SHIFTED>(from.total[c % LANES], SHIFTED ? from.top[c % LANES] : 0.0f, into.sum + j.begin + c,
                   into.top ? into.top + j.begin + c : nullptr);
  }
}

FASTNCE_INLINE void add_positive(const Problem& p, const Sums& side, int64_t at, float t) {
  side.pos[at] += t;
  if (!p.in_tile) return;
  side.n_pos[at] += 1;
}

// Adds the positives of a register block to the sum of their logits and their number: of their row, and of their column.
FASTNCE_INLINE void add_positives(const Problem& p, const float* t, const int32_t* kind, Range i, Range j, const Sums* rows,
                                  const Sums* columns) {
  for (int64_t row = 0; row < i.size(); ++row)
    for (int64_t c = 0; c < j.size(); ++c)
      if (kind[row * NR + c] == POSITIVE) {
        const float value = t[row * NR + c];
        add_positive(p, *rows, i.begin + row, value);
        if (columns) add_positive(p, *columns, j.begin + c, value);
      }
}

// ---------------------------------------------------------------- metrics, in plain loops: training does not ask for them

// The largest positive t of the rows, and of the columns where they count. It is one of the logits that negatives are compared as: those of
// equal rows have the same bits.
static void see_positives(const Problem& p, const float* panels, Range i, Range j, float* rows, float* columns) {
  alignas(64) float t[MR * NR];
  alignas(64) int32_t kind[MR * NR];
  for (int64_t column = j.begin; column < j.end; column += NR)
    for (int64_t row = i.begin; row < i.end; row += MR) {
      const Range own{row, std::min(row + MR, i.end)}, here{column, std::min(column + NR, j.end)};
      if (all_negative(p, own, here) || !classify(p, own, here, kind)) continue;
      logits(p, panels, own, column, t);
      for (int64_t r = 0; r < own.size(); ++r)
        for (int64_t c = 0; c < here.size(); ++c)
          if (kind[r * NR + c] == POSITIVE) {
            raise(rows[own.begin + r], t[r * NR + c]);
            if (columns) raise(columns[here.begin + c], t[r * NR + c]);
          }
    }
}

FASTNCE_INLINE void see_negative(const Metrics& side, int64_t at, int64_t other, float t) {
  // The t of a pair that is no negative is -inf, which is neither above nor a tie. A negative that is nan is above.
  side.rank[at] += !(t <= side.high[at]);
  side.ties[at] += t >= side.low[at] && t <= side.high[at];
  // Of equal negatives the one in the lowest column stays, whatever the order of the blocks.
  if (t > side.hardest_t[at] || (t == side.hardest_t[at] && t > NONE && other < side.hardest[at])) {
    side.hardest_t[at] = t;
    side.hardest[at] = other;
  }
}

// Ranks and hardest negatives of one register block; t is -inf where the pair is no negative.
FASTNCE_INLINE void see_negatives(const float* t, Range own, Range here, const Sums* rows, const Sums* columns) {
  for (int64_t row = 0; row < own.size(); ++row)
    for (int64_t c = 0; c < here.size(); ++c) {
      see_negative(rows->metrics, own.begin + row, here.begin + c, t[row * NR + c]);
      if (columns) see_negative(columns->metrics, here.begin + c, own.begin + row, t[row * NR + c]);
    }
}

// ---------------------------------------------------------------- a block

// Adds all register blocks of a block to the sums of its rows and, with COLUMNS, of its columns.
template <bool SHIFTED, bool COLUMNS>
static void forward_tile(const Problem& p, const float* panels, Range i, Range j, const Sums* rows, const Sums* columns,
                         Lanes<SHIFTED>* lanes) {
  Lanes<SHIFTED>* negative = lanes;
  Lanes<SHIFTED>* positive = lanes + i.size();
  std::fill(negative, negative + (p.in_tile ? 2 : 1) * i.size(), Lanes<SHIFTED>::empty());
  alignas(64) float t[MR * NR], kept[MR * NR];
  alignas(64) int32_t kind[MR * NR];
  for (int64_t column = j.begin; column < j.end; column += NR) {
    const Range here{column, std::min(column + NR, j.end)};
    Lanes<SHIFTED> by_column[2][NV];
    for (auto& kinds : by_column) std::fill(kinds, kinds + NV, Lanes<SHIFTED>::empty());
    for (int64_t row = i.begin; row < i.end; row += MR) {
      const Range own{row, std::min(row + MR, i.end)};
      const int count = static_cast<int>(own.size());
      logits(p, panels, own, column, t);
      if (__builtin_expect(here.size() == NR && all_negative(p, own, here), 1)) {
        add_block<SHIFTED, COLUMNS>(with_bias(p, t, count, kept), count, negative + row - i.begin, by_column[0]);
        if (rows->metrics.rank) see_negatives(t, own, here, rows, COLUMNS ? columns : nullptr);
        continue;
      }
      const bool some = classify(p, own, here, kind);
      keep(t, kind, NEGATIVE, count, kept);
      if (rows->metrics.rank) see_negatives(kept, own, here, rows, COLUMNS ? columns : nullptr);
      add_block<SHIFTED, COLUMNS>(with_bias(p, kept, count, kept), count, negative + row - i.begin, by_column[0]);
      if (!some) continue;
      add_positives(p, t, kind, own, here, rows, COLUMNS ? columns : nullptr);
      if (!p.in_tile) continue;
      keep(t, kind, POSITIVE, count, kept);
      add_block<SHIFTED, COLUMNS>(with_bias(p, kept, count, kept), count, positive + row - i.begin, by_column[1]);
    }
    if constexpr (COLUMNS) {
      flush_columns(by_column[0], here, {columns->negative, columns->top_negative});
      if (p.in_tile) flush_columns(by_column[1], here, {columns->positive, columns->top_positive});
    }
  }
  flush_rows(negative, i, {rows->negative, rows->top_negative});
  if (p.in_tile) flush_rows(positive, i, {rows->positive, rows->top_positive});
}

}  // namespace fastnce::FASTNCE_LEVEL
