// Passes over single rows, O(N D): operands for the tiles, aligned pairs, the backward of the normalisation. A warp has one row, and a lane
// takes four neighbours of it in a step.
//
//     x~ = 2^k x,   x^ = r x = factor x~        t = log2(e) scale <x^_i, y^_j>        dL/dx = r (g - x^ <x^, g>),  g = dL/dx^
#pragma once

#include <cmath>
#include <cstring>

#include "rows.h"
#include "tile.cuh"

namespace fastnce::cuda {

// EPS and LARGEST of fastnce/precision.py: a shorter row counts as zero, and the square of a longer one may leave float32.
constexpr float EPS = 1e-12f;
constexpr float LARGEST = 1e18f;
// The largest element of an operand's row is in [2^8, 2^9): dot products of 8,192 columns stay below 2^31. Half a step of float16's
// smallest numbers, 2^-25, is 2^-33 of it.
constexpr int EXPONENT = 8;
// Factor of a row that counts as zero, 2^-100: small enough that its similarities are 0, and not 0 itself, because -inf * 0 is nan.
constexpr float SHORT = 7.888609052210118e-31f;

constexpr int ROW_THREADS = 128;
constexpr int ROWS_PER_BLOCK = ROW_THREADS / 32;
constexpr int STEP = 4 * 32;  // columns
// The gradient of a row is needed twice. This many steps of it stay in registers; of longer rows, which have one split, the rest is read
// again.
constexpr int KEPT = 2;

// ---------------------------------------------------------------- four neighbours

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTNCE_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FASTNCE_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTNCE_DEVICE float to_float(float x) { return x; }
FASTNCE_DEVICE float to_float(Half x) { return from_half(x.bits); }
FASTNCE_DEVICE float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

FASTNCE_DEVICE void round_to(float& to, float x) { to = x; }
FASTNCE_DEVICE void round_to(Half& to, float x) { to.bits = to_half(x); }
// To the nearest, ties to even. nan has a case of its own: a carry in its bits could make an infinity of it.
FASTNCE_DEVICE void round_to(BFloat16& to, float x) {
  const uint32_t bits = float_to_bits(x);
  to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff);
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T of[4];
};

struct Four {
  float of[4];
};

// The first element of a row.
template <class T>
FASTNCE_DEVICE T* row_at(T* data, int64_t row, int64_t stride) {
  return data + row * stride;
}

// Whether a row has four columns from `column` on, and one access takes them. Neither base nor stride need be aligned to that.
template <class T>
FASTNCE_DEVICE bool at_once(const T* at, int column, int columns) {
  return column + 4 <= columns && reinterpret_cast<uintptr_t>(at) % sizeof(Quad<T>) == 0;
}

// Four columns of a row from `column` on, 0 outside.
template <class T>
FASTNCE_DEVICE Four load(const T* row, int column, int columns) {
  const T* at = row + column;
  Four x;
  if (at_once(at, column, columns)) {
    const Quad<T> four = *reinterpret_cast<const Quad<T>*>(at);
#pragma unroll
    for (int e = 0; e < 4; ++e) x.of[e] = to_float(four.of[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) x.of[e] = column + e < columns ? to_float(at[e]) : 0.0f;
  }
  return x;
}

template <class T>
FASTNCE_DEVICE void store(T* row, int column, int columns, const Four& x) {
  T* at = row + column;
  Quad<T> four;
#pragma unroll
  for (int e = 0; e < 4; ++e) round_to(four.of[e], x.of[e]);
  if (at_once(at, column, columns)) {
    *reinterpret_cast<Quad<T>*>(at) = four;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < columns) at[e] = four.of[e];
  }
}

FASTNCE_DEVICE float dot(const Four& x, const Four& y) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; ++e) sum += x.of[e] * y.of[e];
  return sum;
}

// ---------------------------------------------------------------- warps

FASTNCE_DEVICE int own_row() { return block_index() * ROWS_PER_BLOCK + thread_index() / 32; }
FASTNCE_DEVICE int own_column() { return thread_index() % 32 * 4; }
FASTNCE_DEVICE bool first_of_warp() { return thread_index() % 32 == 0; }

FASTNCE_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
FASTNCE_DEVICE float warp_largest(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value = larger(value, shuffle_xor(value, mask));
  return value;
}

// ---------------------------------------------------------------- operands

struct PowerOfTwo {
  float up, down;  // 2^k, 2^-k

  // Lifts `largest` into [2^EXPONENT, 2^(EXPONENT + 1)). k is at most 120, so that 2^k is finite.
  FASTNCE_DEVICE static PowerOfTwo of(float largest) {
    const int exponent = float_to_bits(largest) >> 23 & 255, wanted = EXPONENT + 127 - exponent, k = wanted < 120 ? wanted : 120;
    return {bits_to_float(static_cast<uint32_t>(127 + k) << 23), bits_to_float(static_cast<uint32_t>(127 - k) << 23)};
  }
};

// For all padded rows:
//   tiles          x~ in float16, which holds half-precision input exactly; in two parts a high one and the rest
//   factor         x^ = factor x~
//   inverse_norm   1 / |x|; 1 where not normalize, 0 for a zero row, nan for one that is not finite or longer than LARGEST
template <class T>
FASTNCE_KERNEL(ROW_THREADS, 1)
prepare(const RawRows x, const Operand out, const bool normalize) {
  const int i = own_row();
  if (i >= out.padded) return;
  const int columns = i < x.rows ? x.columns : 0;
  const T* row = row_at(static_cast<const T*>(x.data), i, x.stride);
  float largest = 0.0f;
  bool infinite = false;
#pragma unroll 4
  for (int column = own_column(); column < columns; column += STEP) {
    const Four four = load(row, column, columns);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float size = fabsf(four.of[e]);
      largest = larger(largest, size);
      infinite |= !(size < infinity());
    }
  }
  infinite = any_lane(infinite);
  const PowerOfTwo two = PowerOfTwo::of(infinite ? 1.0f : warp_largest(largest));
  Half* to = reinterpret_cast<Half*>(row_at(out.tiles, i, static_cast<int64_t>(out.parts) * out.depth));
  float square = 0.0f;
#pragma unroll 4
  for (int column = own_column(); column < out.depth; column += STEP) {
    Four lifted = load(row, column, columns), rest;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      lifted.of[e] = infinite ? 0.0f : lifted.of[e] * two.up;
      rest.of[e] = lifted.of[e] - from_half(to_half(lifted.of[e]));
    }
    square += dot(lifted, lifted);
    store(to, column, out.depth, lifted);
    if (out.parts == 2) store(to + out.depth, column, out.depth, rest);
  }
  float factor = two.down, r = 1.0f;
  bool counts = !infinite;
  if (normalize) {
    const float norm = sqrtf(warp_sum(square)), length = norm * two.down;
    factor = length < EPS ? SHORT : 1.0f / norm;
    r = length < EPS ? 0.0f : factor * two.up;
    counts = counts && length <= LARGEST;
  }
  if (!first_of_warp()) return;
  out.factor[i] = counts ? factor : not_a_number();
  if (i < x.rows) out.inverse_norm[i] = counts ? r : not_a_number();
}

// ---------------------------------------------------------------- aligned pairs

// t of the pairs (first_row + p, first_column + p), from the raw rows.
template <class T>
FASTNCE_KERNEL(ROW_THREADS, 1)
aligned(const RawRows x, const RawRows y, const Aligned of) {
  const int pair = own_row(), i = of.first_row + pair, j = of.first_column + pair;
  if (pair >= of.pairs) return;
  const T *left = row_at(static_cast<const T*>(x.data), i, x.stride), *right = row_at(static_cast<const T*>(y.data), j, y.stride);
  float sum = 0.0f;
#pragma unroll 4
  for (int column = own_column(); column < x.columns; column += STEP)
    sum += dot(load(left, column, x.columns), load(right, column, x.columns));
  sum = warp_sum(sum);
  // The dot product is multiplied by one norm, then by the other: the product of both norms may leave float32.
  if (first_of_warp()) of.t[pair] = sum * of.r_x[i] * of.r_y[j] * (valid(of.scale) * LOG2E);
}

// ---------------------------------------------------------------- gradients

// The gradient g = dL/dx^ of one row.
template <class T>
struct Upstream {
  const float* dx;
  const T* partner;  // row of y, or null
  int64_t split;
  int splits, columns;
  float factor, pair;

  // Four columns of it: the splits are added in their order, then the aligned pair.
  FASTNCE_DEVICE Four at(int column) const {
    Four g = load(dx, column, columns);
    for (int n = 1; n < splits; ++n) {
      const Four more = load(dx + n * split, column, columns);
#pragma unroll
      for (int e = 0; e < 4; ++e) g.of[e] += more.of[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) g.of[e] *= factor;
    if (!partner) return g;
    const Four y = load(partner, column, columns);
#pragma unroll
    for (int e = 0; e < 4; ++e) g.of[e] += pair * y.of[e];
    return g;
  }
};

// dL/dx of the raw rows.
//   dx     lift * sum_j w_ij y^_j over the tiles of a split
//   pair   w of the aligned pair (i, i + up) or (i, i + down); of each row at most one exists
template <class T>
FASTNCE_KERNEL(ROW_THREADS, 1)
finish(const RawRows x, const RawRows y, const Finish of) {
  const int i = own_row();
  if (i >= x.rows) return;
  const int64_t above = int64_t{i} + of.up, below = int64_t{i} + of.down, j = above >= 0 && above < y.rows ? above : below;
  const bool paired = j >= 0 && j < y.rows;
  const T* row = row_at(static_cast<const T*>(x.data), i, x.stride);
  T* out = row_at(static_cast<T*>(of.out), i, x.columns);
  const float scale = valid(of.scale), r = of.r_x[i];
  const Upstream<T> g{row_at(of.dx, i, of.dx_row),
                      paired ? row_at(static_cast<const T*>(y.data), j, y.stride) : nullptr,
                      of.dx_split,
                      of.splits,
                      x.columns,
                      scale / *of.lift,
                      paired ? of.pair[i] * scale * of.r_y[j] : 0.0f};
  Four kept[KEPT];
  float radial = 0.0f;
  const auto project = [&](int column, const Four& at) {
    const Four raw = load(row, column, x.columns);
#pragma unroll
    for (int e = 0; e < 4; ++e) radial += raw.of[e] * r * at.of[e];
  };
#pragma unroll
  for (int n = 0; n < KEPT; ++n) {
    const int column = own_column() + n * STEP;
    if (column >= x.columns) continue;
    kept[n] = g.at(column);
    if (of.normalize) project(column, kept[n]);
  }
  if (of.normalize) {
    for (int column = own_column() + KEPT * STEP; column < x.columns; column += STEP) project(column, g.at(column));
    radial = warp_sum(radial);
  }
  const auto write = [&](int column, Four at) {
    const Four raw = load(row, column, x.columns);
    if (of.normalize)
#pragma unroll
      for (int e = 0; e < 4; ++e) at.of[e] = r * (at.of[e] - raw.of[e] * r * radial);
    store(out, column, x.columns, at);
  };
#pragma unroll
  for (int n = 0; n < KEPT; ++n) {
    const int column = own_column() + n * STEP;
    if (column < x.columns) write(column, kept[n]);
  }
  for (int column = own_column() + KEPT * STEP; column < x.columns; column += STEP) write(column, g.at(column));
}

}  // namespace fastnce::cuda
