// One register block of the logits: t_ij of a few rows and columns, what they are worth, and the kinds of their pairs. forward.h and
// backward.h go on from there, for a block of many such.
#pragma once

#include <algorithm>
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

// c[m][v] += sum_k a[m][k] b[k][v]: rows m of a, vectors v of b. a is given by its rows, or BY_COLUMN as its transpose.
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

// t of MR rows against one panel of NR columns, which is y transposed: panel[k * NR + column]. The function is not inlined, and its result
// goes through memory: with the exponentials inlined behind it, GCC spills the sums inside the loop, at a quarter of the speed.
__attribute__((noinline)) static void against_panel(int64_t depth, const float* const* rows, const float* panel, float* t) {
  Vec c[MR][NV] = {};
  multiply<NV, false>(depth, rows, nullptr, 0, panel, NR, c);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(t + m * NR + v * LANES, c[m][v]);
}

// t of the rows i, at most MR, and of the columns from `column` on, all of one panel. Where there are fewer rows the last one is repeated.
FASTNCE_INLINE void logits(const Problem& p, const float* panels, Range i, int64_t column, float* t) {
  const float* rows[MR];
  for (int m = 0; m < MR; ++m) rows[m] = p.x + std::min(i.begin + m, i.end - 1) * p.pitch;
  against_panel(p.d, rows, panels + column / NR * p.d * NR, t);
}

// t with the bias inside, as term and weight take it: t itself without one, otherwise in `out`, which may be t.
FASTNCE_INLINE const float* with_bias(const Problem& p, const float* t, int rows, float* out) {
  if (p.bias == 0.0f) return t;
  for (int e = 0; e < rows * NR; ++e) out[e] = t[e] + p.bias;
  return out;
}

// Copies NR rows of y into a panel (d, NR), transposed; columns from n on are zero.
FASTNCE_INLINE void pack_panel(const Problem& p, int64_t panel, float* out) {
  const int64_t first = panel * NR, columns = std::min<int64_t>(NR, p.n - first);
  for (int64_t k = 0; k < p.d; k += LANES)  // a few columns of all rows at a time, so that reads and writes stay in L1
    for (int64_t c = 0; c < NR; ++c)
      for (int64_t l = k; l < std::min<int64_t>(k + LANES, p.d); ++l) out[l * NR + c] = c < columns ? p.y[(first + c) * p.pitch + l] : 0.0f;
}

// ---------------------------------------------------------------- the formula

// What a logit adds to the sum of its row and of its column: 2^t, that is exp(s). With a base it is divided by 2^base.
FASTNCE_INLINE Vec term(Vec t) { return exp2(t); }
FASTNCE_INLINE Vec term(Vec t, Vec base) { return exp2(t - base); }

// The derivative of the term by s. The coefficient of a row or column makes that one's part of the weight dL/ds of it.
FASTNCE_INLINE Vec weight(Vec t) { return term(t); }
FASTNCE_INLINE Vec weight(Vec t, Vec base) { return term(t, base); }

// ---------------------------------------------------------------- kinds of pairs

// Whether the line j - i == diagonal has a pair in the rectangle.
FASTNCE_INLINE bool meets(Range i, Range j, int64_t diagonal) { return i.begin + diagonal < j.end && j.begin < i.end + diagonal; }

FASTNCE_INLINE bool all_negative(const Problem& p, Range i, Range j) {
  const Rules& r = p.rules;
  if (r.q_label || r.q_exclude || r.mask) return false;
  if (r.exclude_self && meets(i, j, 0)) return false;
  if (!r.has_offset) return true;
  return !meets(i, j, r.offset) && !(p.symmetric && meets(i, j, -r.offset));
}

// The kinds of the pairs of a register block, row by row; columns from j.end on are excluded. Returns whether some pair is positive.
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
      // Where !in_tile the caller counts the aligned pairs: here they only are no negatives, and their logit is kept.
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

}  // namespace fastnce::FASTNCE_LEVEL
