// One warp's part of a tile, a strip of 16 rows by 8 NB columns in the layout of the tensor cores: kinds of pairs, logits, log-sums,
// weights. Both families of kernels, mma.sync and wgmma, use it. The formulas are those of docs/math.md, in base 2 and without the bias.
#pragma once

#include "device.cuh"
#include "problem.h"

namespace fastnce::cuda {

constexpr float LOG2E = 1.4426950408889634f;
// The largest |logit|, in nats, of the unshifted kernels: 2^t, a sum of 2^31 such terms, and an upstream gradient over it are then normal
// float32 numbers.
constexpr float UNSHIFTED = 40.0f;
FASTNCE_DEVICE float infinity() { return __builtin_huge_valf(); }
FASTNCE_DEVICE float not_a_number() { return __builtin_nanf(""); }

// The scale behind the pointer, nan where it is no positive number: then everything computed with it is nan.
FASTNCE_DEVICE float valid(const float* scale) {
  const float value = *scale;
  return value > 0.0f && value < infinity() ? value : not_a_number();
}

// factor, 1 where it is nan. The weights of a row that is nan are nan where it counts, and 0 where it is excluded: 0 * nan is nan.
FASTNCE_DEVICE float finite(float factor) { return factor == factor ? factor : 1.0f; }

// The numbers of a strip that one thread holds: products <x~_i, y~_j>, then logits, then weights.
template <int NB>
using Strip = float[NB][4];

// Vectors of the columns of a tile, beside it in shared memory.
enum Field { BETA, LABEL, EXCLUDE, BASE, FACTOR, BASE_POS, FACTOR_POS, SHARE };
// The number of these that a kernel has. Ids are two more, the coefficients of a gradient again two, or five with ids.
template <bool CONTENT>
constexpr int FORWARD_FIELDS = CONTENT ? EXCLUDE + 1 : BETA + 1;
template <bool CONTENT>
constexpr int BACKWARD_FIELDS = CONTENT ? SHARE + 1 : FACTOR + 1;

template <int BN>
struct Columns {
  float* at;

  FASTNCE_DEVICE float* field(Field f) const { return at + f * BN; }
  FASTNCE_DEVICE float value(Field f, int column) const { return at[f * BN + column]; }
  FASTNCE_DEVICE int id(Field f, int column) const { return reinterpret_cast<const int*>(at)[f * BN + column]; }
};

// Where FIELDS vectors of all columns are in global memory; null where there is none.
template <int FIELDS>
struct Vectors {
  const void* of[FIELDS];
};

template <int FIELDS>
FASTNCE_DEVICE Vectors<FIELDS> column_vectors(const Problem& p, const float* weights) {
  Vectors<FIELDS> v{};
  v.of[BETA] = p.b;
  if constexpr (FIELDS > EXCLUDE) {
    v.of[LABEL] = p.rules.k_label;
    v.of[EXCLUDE] = p.rules.k_exclude;
  }
  if constexpr (FIELDS > FACTOR) {
    const int fields = p.rules.in_tile ? 5 : 2;
#pragma unroll
    for (int f = 0; f < FIELDS - BASE; ++f)
      v.of[BASE + f] = weights && f < fields ? weights + f * static_cast<int64_t>(p.column_padded) : nullptr;
  }
  return v;
}

// The two rows of a strip that a thread holds.
struct Rows {
  int i[2];
  float alpha[2];
  int label[2], exclude[2];

  // first: row 0 of the strip; multiplier: a factor of all alphas.
  FASTNCE_DEVICE static Rows load(const Problem& p, int first, float multiplier) {
    const Rules& r = p.rules;
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + fragment_row(thread_index() % 32, 2 * h);
      rows.i[h] = i;
      rows.alpha[h] = p.a[i] * multiplier;
      rows.label[h] = r.q_label ? r.q_label[i] : 0;
      rows.exclude[h] = r.q_exclude ? r.q_exclude[i] : 0;
    }
    return rows;
  }
};

// ---------------------------------------------------------------- kinds of pairs

// One bit for each of the 2 NB pairs of a thread's two rows. Bit c is column c % 2 of the thread's two in block c / 2.
struct Kinds {
  uint32_t negative[2], positive[2];
};

template <int NB>
FASTNCE_HD uint32_t all_pairs() {
  return static_cast<uint32_t>((uint64_t{1} << 2 * NB) - 1);
}

// Whether some pair of `rows` rows from i0 and `columns` columns from j0 is not negative, by index alone.
FASTNCE_HD bool needs_mask(const Rules& r, int i0, int j0, int rows, int columns) {
  return meets(i0, j0, rows, columns, r.own) || meets(i0, j0, rows, columns, r.up) || meets(i0, j0, rows, columns, r.down) ||
         i0 + rows > r.rows || j0 + columns > r.columns;
}

// The rules of fastnce/pairs.py. Only if in_tile are aligned pairs positives here: otherwise they are neither.
template <int NB, bool CONTENT, class Columns>
FASTNCE_DEVICE Kinds classify(const Rules& r, const Rows& rows, int j0, const Columns& columns) {
  Kinds kinds{};
  const uint8_t* mask[2] = {};
  if (CONTENT && r.mask)
    for (int h = 0; h < 2; ++h) mask[h] = r.mask + static_cast<int64_t>(rows.i[h] % r.mask_rows) * r.mask_row;
#pragma unroll
  for (int c = 0; c < 2 * NB; ++c) {
    const int column = c / 2 * 8 + fragment_column(thread_index() % 32, c % 2), j = j0 + column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = rows.i[h], step = j - i;
      const bool inside = i < r.rows && j < r.columns && step != r.own;
      const bool aligned = step == r.up || step == r.down;
      bool positive = false, negative = inside && !aligned;
      if constexpr (CONTENT) {
        const bool kept = inside && !(r.q_exclude && rows.exclude[h] == columns.id(EXCLUDE, column));
        bool same = false;
        if (r.in_tile && kept) {
          if (r.q_label) same = rows.label[h] == columns.id(LABEL, column);
          if (r.mask) same = same || mask[h][static_cast<int64_t>(j % r.mask_columns) * r.mask_column];
        }
        positive = r.in_tile && (same || (inside && aligned));
        negative = kept && !same && !aligned;
      }
      kinds.negative[h] |= static_cast<uint32_t>(negative) << c;
      kinds.positive[h] |= static_cast<uint32_t>(positive) << c;
    }
  }
  return kinds;
}

// The kinds of the pairs of a strip, a part of a tile of `height` rows from i0. Where index alone decides, all pairs of most tiles are
// negative, and none is looked at.
template <int NB, bool CONTENT, class Columns>
FASTNCE_DEVICE Kinds kinds_of(const Rules& r, const Rows& rows, int i0, int height, int j0, const Columns& columns) {
  if (CONTENT || needs_mask(r, i0, j0, height, 8 * NB)) return classify<NB, CONTENT>(r, rows, j0, columns);
  return {{all_pairs<NB>(), all_pairs<NB>()}, {0, 0}};
}

FASTNCE_DEVICE bool has(uint32_t pairs, int c) { return pairs >> c & 1; }

// ---------------------------------------------------------------- logits

// t by the fewest multiplications; alpha is log2(e) scale a. It serves ranks, and logits in range and in one part: there the error that
// logit() avoids is far below the rounding of the input.
FASTNCE_DEVICE float quick_logit(float product, float beta, float alpha) { return product * beta * alpha; }
// t, the same number from both ends of a pair; alpha is a, largest is log2(e) scale. Weights are divided by sums over rows and by sums over
// columns: with factors in another order, t from one end would be off by u scale, at a temperature of 0.005 ten times the error of the
// gradient.
FASTNCE_DEVICE float logit(float product, float beta, float alpha, float largest) { return product * (beta * alpha) * largest; }

// Turns the products of a strip into logits.
template <int NB, bool QUICK, class Columns>
FASTNCE_DEVICE void to_logits(Strip<NB>& s, const Rows& rows, const Columns& columns, float largest) {
#pragma unroll
  for (int nb = 0; nb < NB; ++nb)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float beta = columns.value(BETA, nb * 8 + fragment_column(thread_index() % 32, e)), alpha = rows.alpha[e / 2];
      s[nb][e] = QUICK ? quick_logit(s[nb][e], beta, alpha) : logit(s[nb][e], beta, alpha, largest);
    }
}

// ---------------------------------------------------------------- the formula

// What a logit adds to the sum of its row and of its column: 2^t, that is exp(s). With a base it is divided by 2^base.
FASTNCE_DEVICE float term(float t) { return exp2_fast(t); }
FASTNCE_DEVICE float term(float t, float base) { return exp2_fast(t - base); }

// The derivative of the term by s. The factor of a row or column makes that one's part of the weight dL/ds of it.
FASTNCE_DEVICE float weight(float t) { return term(t); }
FASTNCE_DEVICE float weight(float t, float base) { return term(t, base); }

// ---------------------------------------------------------------- statistics

// Merges the values of the four lanes that hold the same rows.
template <class T, class Merge>
FASTNCE_DEVICE T over_quad(T value, const Merge& merge) {
  value = merge(value, shuffle_xor(value, 1));
  return merge(value, shuffle_xor(value, 2));
}
template <class T>
FASTNCE_DEVICE T quad_sum(T value) {
  return over_quad(value, [](T a, T b) { return a + b; });
}
FASTNCE_DEVICE bool first_of_quad() { return thread_index() % 4 == 0; }

// The sum total 2^top. Every lane has its own until the end, so that lanes exchange nothing while tiles are visited.
struct LogSum {
  float top = -infinity(), total = 0.0f;

  FASTNCE_DEVICE static float base(float top) {
    // A sum of nothing so far gets base 0, and 2^-inf = 0: -inf - -inf would be nan.
    return top == -infinity() ? 0.0f : top;
  }

  // Adds the pairs of row h whose bit is set.
  template <int NB>
  FASTNCE_DEVICE void add(const Strip<NB>& t, int h, uint32_t pairs) {
    if (pairs == all_pairs<NB>())
      add_if<NB>(t, h, [](int) { return true; });
    else
      add_if<NB>(t, h, [&](int c) { return has(pairs, c); });
  }

  template <int NB, class Kept>
  FASTNCE_DEVICE void add_if(const Strip<NB>& t, int h, const Kept& kept) {
    float most = top;
#pragma unroll
    for (int c = 0; c < 2 * NB; ++c) most = kept(c) ? larger(most, t[c / 2][2 * h + c % 2]) : most;
    const float from = base(most);
    total *= exp2_fast(top - from);
    top = most;
#pragma unroll
    for (int c = 0; c < 2 * NB; ++c) total += kept(c) ? term(t[c / 2][2 * h + c % 2], from) : 0.0f;
  }

  FASTNCE_DEVICE void merge_quad() {
    const float mine = top;
    top = over_quad(top, [](float a, float b) { return larger(a, b); });
    total = quad_sum(total * exp2_fast(mine - base(top)));
  }
};

// Sums the 2 NB columns of every lane over the rows of the warp. Afterwards a lane has NB / 4 of the sums, from scattered_first on.
template <int NB, int STEP = 0>
FASTNCE_DEVICE void scatter_sums(float (&sums)[2 * NB]) {
  constexpr int HALF = 2 * NB >> (STEP + 1);
  const bool upper = thread_index() >> (4 - STEP) & 1;
#pragma unroll
  for (int c = 0; c < HALF; ++c) {
    const float sent = upper ? sums[c] : sums[c + HALF], kept = upper ? sums[c + HALF] : sums[c];
    sums[c] = kept + shuffle_xor(sent, 16 >> STEP);
  }
  if constexpr (STEP < 2) scatter_sums<NB, STEP + 1>(sums);
}

// ---------------------------------------------------------------- weights

// Coefficients of one row or column, see Weights in problem.h.
struct Coefficients {
  float base, factor, base_pos, factor_pos, share;
};

FASTNCE_DEVICE Coefficients row_coefficients(const float* vectors, int64_t padded, int i, bool in_tile) {
  const float* at = vectors + i;
  if (!in_tile) return {at[0], at[padded], 0.0f, 0.0f, 0.0f};
  return {at[0], at[padded], at[2 * padded], at[3 * padded], at[4 * padded]};
}

template <class Columns>
FASTNCE_DEVICE Coefficients column_coefficients(const Columns& columns, int column, bool in_tile) {
  if (!in_tile) return {columns.value(BASE, column), columns.value(FACTOR, column), 0.0f, 0.0f, 0.0f};
  return {columns.value(BASE, column), columns.value(FACTOR, column), columns.value(BASE_POS, column), columns.value(FACTOR_POS, column),
          columns.value(SHARE, column)};
}

FASTNCE_DEVICE float one_side(float t, const Coefficients& of, bool positive) {
  const float value = weight(t, positive ? of.base_pos : of.base) * (positive ? of.factor_pos : of.factor);
  return positive ? value + of.share : value;
}

// With 2^-base inside of the factor. Where 2^t itself is in range, one exponential then serves both sides of a pair.
FASTNCE_DEVICE Coefficients unshifted(Coefficients of) {
  of.factor *= exp2_fast(-of.base);
  of.factor_pos *= exp2_fast(-of.base_pos);
  return of;
}

// The terms of a weight: of its row, of its column; ONE_EXPONENTIAL: one serves both, with 2^-base inside of the factors.
template <bool ROWS, bool COLUMNS, bool ONE_EXPONENTIAL>
struct Terms {};
// The terms are known only when the kernel runs.
struct AnyTerms {};

// Turns the products of a strip into its weights.
template <bool CONTENT, int PARTS>
struct Weigher {
  Coefficients row[2];
  bool of_rows, of_columns, one_exponential, in_tile;
  float largest;  // log2(e) scale
  float center;

  FASTNCE_DEVICE static Weigher load(const Problem& p, const Weights& w) {
    const bool unshifted = w.of_rows && w.of_columns && *p.bound <= UNSHIFTED;
    return {{}, w.of_rows, w.of_columns, unshifted, CONTENT && p.rules.in_tile, valid(p.scale) * LOG2E, *w.center};
  }

  // Whether a kernel of these terms is the one to run.
  template <bool ROWS, bool COLUMNS, bool ONE_EXPONENTIAL>
  FASTNCE_DEVICE bool serves(Terms<ROWS, COLUMNS, ONE_EXPONENTIAL>) const {
    return of_rows == ROWS && of_columns == COLUMNS && one_exponential == ONE_EXPONENTIAL;
  }
  FASTNCE_DEVICE bool serves(AnyTerms) const { return true; }

  FASTNCE_DEVICE float row_multiplier() const { return PARTS == 1 && one_exponential ? largest : 1.0f; }

  FASTNCE_DEVICE void load_rows(const Problem& p, const Weights& w, const Rows& rows) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (of_rows) row[h] = row_coefficients(w.row, p.row_padded, rows.i[h], in_tile);
      if (one_exponential) row[h] = unshifted(row[h]);
    }
  }

  // s: products in, weights out, 0 where a pair is not kept; moment += sum of w (t - center) per row.
  template <int NB, bool ROWS, bool COLUMNS, bool ONE_EXPONENTIAL, class Vectors>
  FASTNCE_DEVICE void weigh(Terms<ROWS, COLUMNS, ONE_EXPONENTIAL>, Strip<NB>& s, const Rows& rows, const Vectors& columns,
                            const Kinds& kinds, float (&moment)[2]) const {
#pragma unroll
    for (int nb = 0; nb < NB; ++nb)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int h = e / 2, at = nb * 8 + fragment_column(thread_index() % 32, e);
        const bool positive = CONTENT && has(kinds.positive[h], 2 * nb + e % 2);
        const float beta = columns.value(BETA, at);
        const float alpha = rows.alpha[h];
        const float t = PARTS == 1 && ONE_EXPONENTIAL ? quick_logit(s[nb][e], beta, alpha) : logit(s[nb][e], beta, alpha, largest);
        Coefficients column{};
        if constexpr (COLUMNS) column = column_coefficients(columns, at, in_tile);
        float w;
        if constexpr (ONE_EXPONENTIAL) {
          w = weight(t) * (positive ? row[h].factor_pos + column.factor_pos : row[h].factor + column.factor);
          if (positive) w += row[h].share + column.share;
        } else {
          w = ROWS ? one_side(t, row[h], positive) : 0.0f;
          if constexpr (COLUMNS) w += one_side(t, column, positive);
        }
        const bool kept = positive || has(kinds.negative[h], 2 * nb + e % 2);
        s[nb][e] = kept ? w : 0.0f;
        moment[h] += kept ? w * (t - center) : 0.0f;
      }
  }

  template <int NB, class Vectors>
  FASTNCE_DEVICE void weigh(AnyTerms, Strip<NB>& s, const Rows& rows, const Vectors& columns, const Kinds& kinds,
                            float (&moment)[2]) const {
    if (one_exponential)
      weigh<NB>(Terms<true, true, true>{}, s, rows, columns, kinds, moment);
    else if (of_rows && of_columns)
      weigh<NB>(Terms<true, true, false>{}, s, rows, columns, kinds, moment);
    else if (of_rows)
      weigh<NB>(Terms<true, false, false>{}, s, rows, columns, kinds, moment);
    else
      weigh<NB>(Terms<false, true, false>{}, s, rows, columns, kinds, moment);
  }
};

// Two float32 numbers as float16, and the rest of each as float16 again. It is the only rounding to float16, after every sum that cancels.
FASTNCE_DEVICE void halves(float first, float second, uint32_t& high, uint32_t& low) {
  high = to_half2(first, second);
  low = to_half2(first - from_half(static_cast<uint16_t>(high)), second - from_half(static_cast<uint16_t>(high >> 16)));
}

}  // namespace fastnce::cuda
