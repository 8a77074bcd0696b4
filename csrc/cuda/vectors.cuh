// Arithmetic with one number per row, O(N) in float64: statistics from the sums of the tiles, coefficients of the weights, the derivatives
// by scale and bias. The lines of torch in fastnce/backends/_gpu/rows.py are the definition.
//
//     lse = ln 2 * log2(sum_splits total 2^top) + bias       pos = ln 2 * (sum of t) / n_pos + bias
//     w_ij = factor_i 2^(t - base_i) for a negative, factor_pos_i 2^(t - base_pos_i) + share_i for a positive
#pragma once

#include <cfloat>
#include <cmath>

#include "tile.cuh"
#include "vectors.h"

namespace fastnce::cuda {

constexpr double LN2 = 0.6931471805599453, LOG2E_DOUBLE = 1.4426950408889634;
constexpr int VECTOR_THREADS = 128;
// Threads of a block that sums over all rows.
constexpr int SUM_THREADS = 512, SUM_WARPS = SUM_THREADS / 32;
// Log2 of the largest lifted weight: half of what float16 holds, as the bound may be off by roundings.
constexpr int LIFTED = 15;

FASTNCE_DEVICE bool empty(double lse) { return lse == -infinity(); }

// ---------------------------------------------------------------- statistics

// log2 of the sum of total 2^top over the splits, `step` apart, and of an unshifted sum.
FASTNCE_DEVICE double log_sum(const float* tops, const float* totals, int64_t step, int splits, const float* unshifted) {
  const double more = unshifted ? *unshifted : 0.0, top_of_more = more > 0.0 ? 0.0 : -infinity();
  double top = top_of_more;
  for (int n = 0; n < splits; ++n) top = fmax(top, static_cast<double>(tops[n * step]));
  // Without a term base 0: -inf - -inf would be nan.
  const double base = empty(top) ? 0.0 : top;
  double sum = 0.0;
  for (int n = 0; n < splits; ++n) sum += totals[n * step] * exp2(tops[n * step] - base);
  return log2(sum + more * exp2(top_of_more - base)) + base;
}

FASTNCE_KERNEL(VECTOR_THREADS, 1) statistics_kernel(const __grid_constant__ Statistics s) {
  const int i = block_index() * VECTOR_THREADS + thread_index();
  if (i >= s.rows) return;
  const int64_t step = s.rows, field = s.splits * step;
  const float* sums = s.sums + i;
  const double bias = s.bias ? *s.bias : 0.0;
  const auto unshifted = [&](int which) { return s.unshifted ? s.unshifted + which * step + i : nullptr; };
  const double own_neg = log_sum(sums, sums + field, step, s.splits, unshifted(0));
  double own_pos = 0.0, pos = 0.0;
  int64_t n_pos = 0;
  if (s.in_tile) {
    own_pos = log_sum(sums + 2 * field, sums + 3 * field, step, s.splits, unshifted(1));
    for (int n = 0; n < s.splits; ++n) {
      pos += sums[4 * field + n * step];
      n_pos += s.count[n * step + i];
    }
    if (s.unshifted) {
      pos += *unshifted(2);
      n_pos += s.unshifted_count[i];
    }
  } else {
    for (int n = 0; n < s.ends; ++n)
      if (const int pair = i - s.end[n]; pair >= 0 && pair < s.pair_count) {
        pos = own_pos = s.pairs[pair];
        n_pos = 1;
      }
  }
  const double mean = n_pos ? pos / n_pos * LN2 + bias : 0.0;
  s.lse_neg[i] = own_neg * LN2 + bias;
  s.lse_pos[i] = n_pos == 0 ? -infinity() : n_pos == 1 ? mean : own_pos * LN2 + bias;
  s.pos[i] = mean;
  s.n_pos[i] = n_pos;
  s.own_neg[i] = own_neg;
  s.own_pos[i] = own_pos;
}

// ---------------------------------------------------------------- sums over all rows

// value[n] = merge(n, ..) over all threads of a block, in one order. All threads get the result.
template <int COUNT, class Merge>
FASTNCE_DEVICE void over_block(double (&value)[COUNT], const Merge& merge) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const auto over_warp = [&](int lanes) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
      for (int mask = lanes / 2; mask; mask /= 2) value[n] = merge(n, value[n], shuffle_xor(value[n], mask));
  };
  over_warp(32);
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
    if (lane == 0) shared[n * SUM_WARPS + warp] = value[n];
  sync_block();
#pragma unroll
  for (int n = 0; n < COUNT; ++n) value[n] = shared[n * SUM_WARPS + lane % SUM_WARPS];
  over_warp(SUM_WARPS);
}

// ---------------------------------------------------------------- coefficients

// Upstream gradients of a row: 0 where it has no negative, or no positive, whatever came down.
struct RowGradients {
  bool no_negative, no_positive;
  double negative, positive, mean;

  FASTNCE_DEVICE static RowGradients of(const SideOf& s, int i) {
    const bool no_negative = empty(s.lse_neg[i]), no_positive = empty(s.lse_pos[i]);
    return {no_negative, no_positive, no_negative ? 0.0 : s.dlse_neg[i], no_positive ? 0.0 : s.dlse_pos[i], no_positive ? 0.0 : s.dpos[i]};
  }

  // The weight of the aligned pair of a row. With one positive, lse_pos and pos are the same number, so their gradients add up.
  FASTNCE_DEVICE double aligned() const { return positive + mean; }
  FASTNCE_DEVICE double share(const SideOf& s, int i) const { return mean / static_cast<double>(s.n_pos[i] > 1 ? s.n_pos[i] : 1); }
};

// Quantities over all rows: the largest |w| of either side, and of the factors; the sums of w, of pos of the rows, and of w t and w of the
// aligned pairs.
enum Quantity { PEAK, PEAK_OF_COLUMNS, FACTORS, DUE, POS, PAIR_MOMENT, PAIR_WEIGHT, QUANTITIES };

struct Sums {
  double of[QUANTITIES] = {};

  FASTNCE_DEVICE static double merge(int quantity, double a, double b) { return quantity <= FACTORS ? fmax(a, b) : a + b; }
  FASTNCE_DEVICE void add(int quantity, double value) { of[quantity] = merge(quantity, of[quantity], value); }
  FASTNCE_DEVICE void over_all_threads() { over_block(of, merge); }
};

// As torch.nan_to_num: 0 for nan.
FASTNCE_DEVICE double bounded(double size, double most) { return size == size ? fmin(size, most) : 0.0; }

FASTNCE_DEVICE double pair_weight(const Contributions& c, int pair) {
  const double w = RowGradients::of(c.side[0], c.first[0] + pair).aligned();
  // The two ends of a pair add up.
  return c.symmetric || c.sides == 2 ? w + RowGradients::of(c.side[c.sides - 1], c.first[1] + pair).aligned() : w;
}

// The quantities over the rows that this thread visits.
FASTNCE_DEVICE Sums sums_of(const Contributions& c, int first, int step) {
  Sums sums;
  const double bias = c.bias ? *c.bias : 0.0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const SideOf& s = c.side[n];
    for (int i = first; i < s.rows; i += step) {
      const RowGradients row = RowGradients::of(s, i);
      const double negative = fabs(row.negative), positive = c.in_tile ? fabs(row.positive) + fabs(row.share(s, i)) : 0.0;
      // fmax would pass over a nan.
      sums.add(PEAK + n, bounded(negative > positive || negative != negative ? negative : positive, DBL_MAX));
      sums.add(DUE, row.negative + row.positive + row.mean);
      if (n == 0) sums.add(POS, s.pos[i] - bias);
    }
    for (int i = first; i < c.factors[n]; i += step) sums.add(FACTORS, bounded(c.factor[n][i], FLT_MAX));
  }
  for (int pair = first; pair < c.pairs; pair += step) {
    const double w = pair_weight(c, pair);
    sums.add(PAIR_MOMENT, w * c.pair_t[pair]);
    sums.add(PAIR_WEIGHT, w);
  }
  return sums;
}

// The power of two that brings `largest` into (2^(LIFTED - 1), 2^LIFTED]; 1 where it is 0 or no finite number.
FASTNCE_DEVICE double lift_of(double largest) {
  if (!(largest > 0.0 && largest < infinity())) return 1.0;
  int exponent;
  const bool power = frexp(largest, &exponent) == 0.5;
  const int lift = LIFTED - (power ? exponent - 1 : exponent);
  return ldexp(1.0, lift < -100 ? -100 : lift > 100 ? 100 : lift);
}

// Stores the base, rounded to float32, and the factor, which takes up the rounding of up to 1e-5 of a bit.
FASTNCE_DEVICE void store_rounded(float* to, int64_t field, bool none, double base, double factor, double lift) {
  const float kept = none ? 0.0f : static_cast<float>(base);
  to[0] = kept;
  to[field] = static_cast<float>(factor * exp2(kept - (none ? 0.0 : base)) * lift);
}

FASTNCE_DEVICE void store_vectors(const Contributions& c, const SideOf& s, int i, double lift) {
  const int64_t field = s.padded;
  float* to = s.vectors + i;
  if (i >= s.rows) {
    for (int n = 0; n < (c.in_tile ? 5 : 2); ++n) to[n * field] = 0.0f;
    return;
  }
  const RowGradients row = RowGradients::of(s, i);
  store_rounded(to, field, row.no_negative, s.own_neg[i], row.negative, lift);
  if (!c.in_tile) return;
  store_rounded(to + 2 * field, field, row.no_positive, s.own_pos[i], row.positive, lift);
  to[4 * field] = static_cast<float>(row.share(s, i) * lift);
}

// The lift is known only after the last row, and factors without it may be too small for float32. So there are two phases: sums over all
// rows, then vectors. One block does both AT_ONCE. Many blocks are launched twice, and leave their sums in `scratch` (blocks, QUANTITIES)
// between.
enum class Phase { AT_ONCE, SUMS, VECTORS };

template <Phase PHASE>
FASTNCE_KERNEL(SUM_THREADS, 1)
coefficients_kernel(const __grid_constant__ Contributions c, double* scratch) {
  const int first = block_index() * SUM_THREADS + thread_index(), step = block_count() * SUM_THREADS;
  Sums sums;
  if (PHASE != Phase::VECTORS) {
    sums = sums_of(c, first, step);
  } else if (thread_index() < block_count()) {
#pragma unroll
    for (int n = 0; n < QUANTITIES; ++n) sums.of[n] = scratch[thread_index() * QUANTITIES + n];
  }
  sums.over_all_threads();
  if (PHASE == Phase::SUMS) {
    if (thread_index() == 0)
#pragma unroll
      for (int n = 0; n < QUANTITIES; ++n) scratch[block_index() * QUANTITIES + n] = sums.of[n];
    return;
  }
  // Where the keys are the queries, a pair has the weights of both of its ends.
  const double peak = (sums.of[PEAK] + sums.of[PEAK_OF_COLUMNS]) * (c.symmetric ? 2.0 : 1.0), lift = lift_of(peak * sums.of[FACTORS]);
  for (int n = 0; n < c.sides; ++n)
    for (int i = first; i < c.side[n].padded; i += step) store_vectors(c, c.side[n], i, lift);
  for (int pair = first; pair < c.pairs; pair += step) c.pair_weights[pair] = static_cast<float>(pair_weight(c, pair));
  if (first != 0) return;
  const int rows = c.side[0].rows;
  const double center = static_cast<float>(sums.of[POS] / (rows > 0 ? rows : 1) * LOG2E_DOUBLE);
  c.scalars[0] = lift;
  c.scalars[1] = center;
  c.scalars[2] = sums.of[DUE];
  c.scalars[3] = c.pairs ? sums.of[PAIR_MOMENT] - center * sums.of[PAIR_WEIGHT] : 0.0;
}

// dscale = (center due + moment + sum(about) / (divide lift)) / (log2(e) scale),   dbias = due
FASTNCE_KERNEL(SUM_THREADS, 1) scale_gradient_kernel(const __grid_constant__ ScaleGradient g) {
  double sum[1] = {};
  for (int part = 0; part < g.parts; ++part)
#pragma unroll 8
    for (int64_t n = thread_index(); n < g.count[part]; n += SUM_THREADS) sum[0] += g.about[part][n];
  over_block(sum, [](int, double a, double b) { return a + b; });
  if (thread_index() != 0) return;
  const double lift = g.scalars[0], center = g.scalars[1], due = g.scalars[2], moment = g.scalars[3];
  *g.dscale = static_cast<float>((center * due + moment + sum[0] / (g.divide * lift)) / (LOG2E_DOUBLE * *g.scale));
  *g.dbias = static_cast<float>(due);
}

}  // namespace fastnce::cuda
