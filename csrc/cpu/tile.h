// One block of the logits: t_ij of a few rows and columns in registers, 2^t, sums of rows and columns; and, backward, the weights w and
// their two products. The formulas are those of docs/math.md:
//
//     forward    l_i = sum_j 2^(t_ij - top_i),  and the same by column
//     backward   w_ij = row term + column term,  dx_i += sum_j w_ij y_j,  dy_j += sum_i w_ij x_i
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "problem.h"
#include "vec.h"

namespace fastnce::FASTNCE_LEVEL {

// A register block: MR rows by NR columns.
constexpr int MR = FASTNCE_ROWS, NV = FASTNCE_VECTORS, NR = NV * LANES;
constexpr float NONE = -std::numeric_limits<float>::infinity();

enum Kind : int32_t { NEGATIVE = 0, POSITIVE = 1, EXCLUDED = 2 };

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// c[m][v] += a[m] b[v] over k: rows m of a, vectors v of b. a is given by its rows, or BY_COLUMN as its transpose.
template <int VECTORS, bool BY_COLUMN>
FASTNCE_INLINE void multiply(int64_t depth, const float* const* rows, const float* a, int64_t lda, const float* b, int64_t ldb,
                             Vec c[MR][VECTORS]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec left = all(BY_COLUMN ? a[k * lda + m] : rows[m][k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) c[m][v] += left * right[v];
    }
  }
}

// t of MR rows against one panel of NR columns, y transposed: panel[k * NR + column]. Out of line, and its result goes through memory: with
// the exponentials inlined behind it, GCC spills the sums inside the loop, a quarter of the speed.
__attribute__((noinline)) static void logits(int64_t depth, const float* const* rows, const float* panel, float* t) {
  Vec c[MR][NV] = {};
  multiply<NV, false>(depth, rows, nullptr, 0, panel, NR, c);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(t + m * NR + v * LANES, c[m][v]);
}

// y transposed into panels of NR columns, each (d, NR); columns behind the last are zero.
FASTNCE_INLINE void pack_panel(const Problem& p, int64_t panel, float* out) {
  const int64_t first = panel * NR, columns = std::min<int64_t>(NR, p.n - first);
  for (int64_t k = 0; k < p.d; k += LANES)  // a few columns of every row at a time: reads and writes both stay in L1
    for (int64_t c = 0; c < NR; ++c)
      for (int64_t l = k; l < std::min<int64_t>(k + LANES, p.d); ++l) out[l * NR + c] = c < columns ? p.y[(first + c) * p.pitch + l] : 0.0f;
}

// ---------------------------------------------------------------- which pair is what

// True where index alone makes some pair of the rectangle positive or excluded.
FASTNCE_INLINE bool meets(Range i, Range j, int64_t diagonal) { return i.begin + diagonal < j.end && j.begin < i.end + diagonal; }

FASTNCE_INLINE bool all_negative(const Problem& p, Range i, Range j) {
  const Rules& r = p.rules;
  if (r.q_label || r.q_exclude || r.mask) return false;
  if (r.exclude_self && meets(i, j, 0)) return false;
  if (!r.has_offset) return true;
  return !meets(i, j, r.offset) && !(p.symmetric && meets(i, j, -r.offset));
}

// Kinds of a register block, row by row; columns from j.end on are excluded. Returns whether any is positive.
static bool classify(const Problem& p, Range i, Range j, int32_t kind[MR * NR]) {
  const Rules& r = p.rules;
  const int columns = static_cast<int>(j.size());
  int32_t any = 0;
  for (int64_t row = i.begin; row < i.end; ++row) {
    int32_t* out = kind + (row - i.begin) * NR;
    for (int c = 0; c < NR; ++c) out[c] = NEGATIVE;
    if (r.q_label && r.q_label[row] >= 0) {
      const int64_t own = r.q_label[row];
      for (int c = 0; c < columns; ++c) out[c] = r.k_label[j.begin + c] == own ? POSITIVE : NEGATIVE;
    }
    if (r.mask) {
      const bool* line = r.mask + row % r.mask_rows * r.mask_columns;
      for (int c = 0; c < columns; ++c)
        if (line[(j.begin + c) % r.mask_columns]) out[c] = POSITIVE;
    }
    if (r.q_exclude && r.q_exclude[row] >= 0) {
      const int64_t own = r.q_exclude[row];
      for (int c = 0; c < columns; ++c)
        if (r.k_exclude[j.begin + c] == own) out[c] = EXCLUDED;
    }
    const auto set = [&](int64_t column, Kind value) {
      if (column >= j.begin && column < j.end) out[column - j.begin] = value;
    };
    if (r.has_offset) {
      // Without content rules the caller adds the aligned pairs himself: here they only leave the negatives, and say their logit.
      set(row + r.offset, POSITIVE);
      if (p.symmetric) set(row - r.offset, POSITIVE);
    }
    if (r.exclude_self) set(row, EXCLUDED);
    for (int c = columns; c < NR; ++c) out[c] = EXCLUDED;
    for (int c = 0; c < NR; ++c) any |= out[c] == POSITIVE;
  }
  return any != 0;
}

// t where the pair is of this kind, elsewhere -inf.
FASTNCE_INLINE void keep(const float* t, const int32_t* kind, Kind wanted, int rows, float* out) {
  for (int e = 0; e < rows * NR; ++e) out[e] = kind[e] == wanted ? t[e] : NONE;
}

// ---------------------------------------------------------------- forward

// Sums of 2^(t - top) with a vector of lanes per row (or per vector of columns); top only where SHIFTED.
template <bool SHIFTED>
struct Lanes {
  Vec total, top;

  static Lanes empty() { return {Vec{}, all(NONE)}; }

  // COUNT vectors at a time: the running total is brought to a new top once for all of them.
  template <int COUNT>
  __attribute__((always_inline)) void add(const Vec* t, int stride) {
    if constexpr (SHIFTED) {
      Vec best = top;
      for (int v = 0; v < COUNT; ++v) best = larger(best, t[v * stride]);
      // Nothing yet, or inf already: inf - inf would be nan. From any finite base 2^-inf is 0, and a sum with 2^inf in it is large.
      const Vec base = best - best == Vec{} ? best : Vec{};
      total *= exp2(top - base);
      for (int v = 0; v < COUNT; ++v) total += exp2(t[v * stride] - base);
      top = best;
    } else {
      for (int v = 0; v < COUNT; ++v) total += t[v * stride];
    }
  }
};

// One sum into a running sum in double.
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

// raise(most, value): most = max(most, value), nan where either is.
FASTNCE_INLINE void raise(float& most, float value) { most = value <= most || std::isnan(most) ? most : value; }

struct Target {
  double* sum;
  float* top;
};

// Adds the sums of one register block's rows to rows[], of its columns to columns[].
template <bool SHIFTED, bool COLUMNS>
FASTNCE_INLINE void add_block(const float* t, int count, Lanes<SHIFTED>* rows, Lanes<SHIFTED>* columns) {
  for (int m = 0; m < count; ++m) {
    Vec line[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      line[v] = load(t + m * NR + v * LANES);
      if constexpr (!SHIFTED) {
        line[v] = exp2(line[v]);
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

// Mean and number of the positives, from either end.
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

// ---------------------------------------------------------------- metrics: few ask for them, so plain loops

// The largest positive t of the rows, and of the columns where they count, before any negative is compared with it. Of the same logits as
// the negatives: those of equal rows have the same bits.
static void see_positives(const Problem& p, const float* panels, Range i, Range j, float* rows, float* columns) {
  alignas(64) float t[MR * NR];
  alignas(64) int32_t kind[MR * NR];
  for (int64_t column = j.begin; column < j.end; column += NR)
    for (int64_t row = i.begin; row < i.end; row += MR) {
      const Range own{row, std::min(row + MR, i.end)}, here{column, std::min(column + NR, j.end)};
      if (all_negative(p, own, here) || !classify(p, own, here, kind)) continue;
      const float* lines[MR];
      for (int m = 0; m < MR; ++m) lines[m] = p.x + std::min(row + m, i.end - 1) * p.pitch;
      logits(p.d, lines, panels + column / NR * p.d * NR, t);
      for (int64_t r = 0; r < own.size(); ++r)
        for (int64_t c = 0; c < here.size(); ++c)
          if (kind[r * NR + c] == POSITIVE) {
            raise(rows[own.begin + r], t[r * NR + c]);
            if (columns) raise(columns[here.begin + c], t[r * NR + c]);
          }
    }
}

FASTNCE_INLINE void see_negative(const Metrics& side, int64_t at, int64_t other, float t) {
  // A pair that is no negative has -inf, which is neither; a negative that is nan is above.
  side.rank[at] += !(t <= side.high[at]);
  side.ties[at] += t >= side.low[at] && t <= side.high[at];
  // The first of equals, whatever the order of the blocks.
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

// ---------------------------------------------------------------- forward, a whole block

// COLUMNS: the block's columns are counted too, into `columns`.
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
      const float* lines[MR];
      for (int m = 0; m < MR; ++m) lines[m] = p.x + std::min(row + m, i.end - 1) * p.pitch;
      logits(p.d, lines, panels + column / NR * p.d * NR, t);
      if (__builtin_expect(here.size() == NR && all_negative(p, own, here), 1)) {
        add_block<SHIFTED, COLUMNS>(t, count, negative + row - i.begin, by_column[0]);
        if (rows->metrics.rank) see_negatives(t, own, here, rows, COLUMNS ? columns : nullptr);
        continue;
      }
      const bool some = classify(p, own, here, kind);
      keep(t, kind, NEGATIVE, count, kept);
      add_block<SHIFTED, COLUMNS>(kept, count, negative + row - i.begin, by_column[0]);
      if (rows->metrics.rank) see_negatives(kept, own, here, rows, COLUMNS ? columns : nullptr);
      if (!some) continue;
      add_positives(p, t, kind, own, here, rows, COLUMNS ? columns : nullptr);
      if (!p.in_tile) continue;
      keep(t, kind, POSITIVE, count, kept);
      add_block<SHIFTED, COLUMNS>(kept, count, positive + row - i.begin, by_column[1]);
    }
    if constexpr (COLUMNS) {
      flush_columns(by_column[0], here, {columns->negative, columns->top_negative});
      if (p.in_tile) flush_columns(by_column[1], here, {columns->positive, columns->top_positive});
    }
  }
  flush_rows(negative, i, {rows->negative, rows->top_negative});
  if (p.in_tile) flush_rows(positive, i, {rows->positive, rows->top_positive});
}

// ---------------------------------------------------------------- backward

template <bool SHIFTED>
FASTNCE_INLINE Vec term(Vec t, Vec coefficient, Vec base) {
  return SHIFTED ? coefficient * exp2(t - base) : coefficient * t;
}

// The weights of one register block, added to w. SOME: only pairs of one kind are kept in t, and the others, which are -inf there, get
// none. Their exponential is 0, but 0 times the coefficient of a row that is nan would be nan.
template <bool SHIFTED, bool COLUMNS, bool SOME>
FASTNCE_INLINE void add_terms(const float* t, int count, const float* of_row, const float* row_base, const float* of_column,
                              const float* column_base, float* w, int64_t ldw, bool first) {
  for (int v = 0; v < NV; ++v) {
    const Vec column = COLUMNS ? load(of_column + v * LANES) : Vec{}, base = COLUMNS && SHIFTED ? load(column_base + v * LANES) : Vec{};
    for (int m = 0; m < count; ++m) {
      const Vec value = load(t + m * NR + v * LANES);
      Vec weight;
      if constexpr (SHIFTED) {
        weight = term<true>(value, all(of_row[m]), all(row_base[m]));
        if constexpr (COLUMNS) weight += term<true>(value, column, base);
      } else {
        weight = exp2(value) * (COLUMNS ? column + of_row[m] : all(of_row[m]));
      }
      if constexpr (SOME) weight = value == NONE ? Vec{} : weight;
      store(w + m * ldw + v * LANES, first ? weight : load(w + m * ldw + v * LANES) + weight);
    }
  }
}

// Coefficients of the columns of one panel, in vectors that can be read whole.
struct PanelWeights {
  alignas(64) float negative[NR], base_negative[NR], positive[NR], base_positive[NR], mean[NR];

  void fill(const Problem& p, const Weights& of, Range j) {
    for (int64_t c = 0; c < NR; ++c) {
      const bool inside = c < j.size();
      const int64_t at = j.begin + c;
      negative[c] = inside ? of.negative[at] : 0.0f;
      base_negative[c] = inside ? of.base_negative[at] : 0.0f;
      positive[c] = inside && p.in_tile ? of.positive[at] : 0.0f;
      base_positive[c] = inside && p.in_tile ? of.base_positive[at] : 0.0f;
      mean[c] = inside && p.in_tile ? of.mean[at] : 0.0f;
    }
  }
};

// w of a whole block, (i.size() rounded up to MR, ldw): what lies behind its edges is zero.
template <bool SHIFTED, bool COLUMNS>
static void weights_tile(const Problem& p, const float* panels, Range i, Range j, const Weights& rows, const Weights* columns,
                         const Wanted& wanted, float* w, int64_t ldw) {
  alignas(64) float t[MR * NR], kept[MR * NR];
  alignas(64) int32_t kind[MR * NR];
  PanelWeights by_column;
  for (int64_t column = j.begin; column < j.end; column += NR) {
    const Range here{column, std::min(column + NR, j.end)};
    if constexpr (COLUMNS) by_column.fill(p, *columns, here);
    for (int64_t row = i.begin; row < i.end; row += MR) {
      const Range own{row, std::min(row + MR, i.end)};
      const int count = static_cast<int>(own.size());
      const float* lines[MR];
      for (int m = 0; m < MR; ++m) lines[m] = p.x + std::min(row + m, i.end - 1) * p.pitch;
      logits(p.d, lines, panels + column / NR * p.d * NR, t);
      float* out = w + (row - i.begin) * ldw + (column - j.begin);
      if (__builtin_expect(here.size() == NR && all_negative(p, own, here), 1)) {
        add_terms<SHIFTED, COLUMNS, false>(t, count, rows.negative + row, rows.base_negative + row, by_column.negative,
                                           by_column.base_negative, out, ldw, true);
      } else {
        const bool some = classify(p, own, here, kind);
        keep(t, kind, NEGATIVE, count, kept);
        add_terms<SHIFTED, COLUMNS, true>(kept, count, rows.negative + row, rows.base_negative + row, by_column.negative,
                                          by_column.base_negative, out, ldw, true);
        if (p.in_tile && some) {
          keep(t, kind, POSITIVE, count, kept);
          add_terms<SHIFTED, COLUMNS, true>(kept, count, rows.positive + row, rows.base_positive + row, by_column.positive,
                                            by_column.base_positive, out, ldw, false);
          for (int m = 0; m < count; ++m)
            for (int64_t c = 0; c < here.size(); ++c)
              if (kind[m * NR + c] == POSITIVE) out[m * ldw + c] += rows.mean[row + m] + (COLUMNS ? by_column.mean[c] : 0.0f);
        }
      }
      if (wanted.moment)
        for (int m = 0; m < count; ++m) {
          Vec moment{};
          for (int v = 0; v < NV; ++v) moment += load(out + m * ldw + v * LANES) * (load(t + m * NR + v * LANES) - wanted.center);
          wanted.moment[row + m] += sum(moment);
        }
    }
  }
}

// c (rows, VECTORS vectors) += a b. a is (rows, depth), or its transpose where BY_COLUMN; b is (depth, ldb) in order.
//
// The product is summed from zero and then added: were every one of its terms added to the running total of thousands of columns, each
// would lose what is rounded off a number of that size, and errors would grow with the square root of their number.
template <int VECTORS, bool BY_COLUMN>
static void add_product(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t row = 0; row < rows; row += MR) {
    const float* lines[MR];
    for (int m = 0; m < MR; ++m) lines[m] = a + std::min(row + m, rows - 1) * lda;
    Vec block[MR][VECTORS] = {};
    multiply<VECTORS, BY_COLUMN>(depth, lines, a + row, lda, b, ldb, block);
    const auto add = [&](int m) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        float* at = c + (row + m) * ldc + v * LANES;
        store(at, load(at) + block[m][v]);
      }
    };
    if (row + MR <= rows) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) add(m);
    } else {
      for (int m = 0; row + m < rows; ++m) add(m);
    }
  }
}

// c (rows, pitch) += a b for all columns of b (depth, pitch), a panel of NR columns at a time, copied to lie in order.
template <bool BY_COLUMN>
static void add_rows(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t pitch, float* c, float* panel) {
  for (int64_t column = 0; column < pitch; column += NR) {
    const int vectors = static_cast<int>(std::min<int64_t>(NR, pitch - column) / LANES);
    for (int64_t k = 0; k < depth; ++k)
      for (int v = 0; v < vectors; ++v) store(panel + k * NR + v * LANES, load(b + k * pitch + column + v * LANES));
    switch (vectors) {
      case 1:
        add_product<1, BY_COLUMN>(rows, depth, a, lda, panel, NR, c + column, pitch);
        break;
      case 2:
        add_product<2, BY_COLUMN>(rows, depth, a, lda, panel, NR, c + column, pitch);
        break;
      case 3:
        add_product<3, BY_COLUMN>(rows, depth, a, lda, panel, NR, c + column, pitch);
        break;
      default:
        add_product<4, BY_COLUMN>(rows, depth, a, lda, panel, NR, c + column, pitch);
    }
  }
}

}  // namespace fastnce::FASTNCE_LEVEL
