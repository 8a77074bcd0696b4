// Vectors of floats by the vector extensions of GCC and Clang: one source, whose vectors are as wide as the including unit says.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastnce::FASTNCE_LEVEL {

#define FASTNCE_INLINE static inline __attribute__((always_inline))

using Vec = float __attribute__((vector_size(FASTNCE_VECTOR_BYTES)));
using IVec = int32_t __attribute__((vector_size(FASTNCE_VECTOR_BYTES)));
// A vector in memory, at any address of a float.
using Stored = float __attribute__((vector_size(FASTNCE_VECTOR_BYTES), aligned(4), may_alias));

constexpr int LANES = FASTNCE_VECTOR_BYTES / 4;

FASTNCE_INLINE Vec load(const float* p) { return *reinterpret_cast<const Stored*>(p); }
FASTNCE_INLINE void store(float* p, Vec x) { *reinterpret_cast<Stored*>(p) = x; }
// x in all lanes. x - 0 is x bit for bit, and costs nothing; 0 + x is not -0 for -0, and costs an addition.
FASTNCE_INLINE Vec all(float x) { return x - Vec{}; }
// nan where either is, as in torch.maximum: a nan must reach the loss.
FASTNCE_INLINE Vec larger(Vec a, Vec b) { return a != a ? a : (a < b ? b : (b != b ? b : a)); }

FASTNCE_INLINE float sum(Vec x) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}

// 2^x with a relative error below 8e-8. It is 0 where 2^x is below 2^-126, so -inf marks a pair that does not count. nan stays nan.
//
// x = n + f with |f| <= 1/2. Adding 1.5 * 2^23 + 127 leaves n + 127 in the last bits of the sum: shifted to the exponent, they are 2^n. The
// polynomial of degree 6 is 2^f, with the least largest relative error. 2^n times 2^f is exact, and for a nan x the polynomial is nan, so
// that the product is nan too, whatever 2^n is. Adding n to the exponent of 2^f as an integer would make numbers of most nans.
FASTNCE_INLINE Vec exp2(Vec x) {
  constexpr float SHIFT = 12582912.0f + 127.0f;
  const Vec least = all(-126.0f), most = all(127.0f);
  const Vec inside = x < least ? least : (x > most ? most : x);
  const Vec shifted = inside + SHIFT;
  const Vec f = inside - (shifted - SHIFT);
  Vec p = all(0x1.41d334p-13f);
  p = p * f + 0x1.5f456ap-10f;
  p = p * f + 0x1.3b2dbcp-7f;
  p = p * f + 0x1.c6aed4p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<IVec>(shifted) << 23);
  return x < least ? Vec{} : p * power;
}

}  // namespace fastnce::FASTNCE_LEVEL
