// The arguments of the kernels: raw pointers and sizes, no torch. The words are those of fastnce/problem.py and fastnce/pairs.py.
//
//     t_ij = <x_i, y_j>, the logit in base 2: x and y are the normalised rows times sqrt(scale * log2 e). term and weight take t + bias
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fastnce {

// The rules of the pairs: the first line of fastnce/pairs.py that applies decides.
struct Rules {
  bool exclude_self = false;
  bool has_offset = false;
  int64_t offset = 0;
  const int64_t* q_label = nullptr;  // (m,); k_* (n,) and, where the keys are the queries, the same as q_*
  const int64_t* k_label = nullptr;
  const int64_t* q_exclude = nullptr;
  const int64_t* k_exclude = nullptr;
  const bool* mask = nullptr;  // (mask_rows, mask_columns); row i meets mask row i % mask_rows
  int64_t mask_rows = 0, mask_columns = 0;
};

struct Problem {
  int64_t m, n, d;
  int64_t pitch;   // floats from one row of x or y to the next: a multiple of PITCH, with zeros from column d on
  const float* x;  // (m, pitch)
  const float* y;  // (n, pitch); x where symmetric
  float bias;      // in base 2
  bool symmetric, two_sided;
  bool unshifted;  // no |s|, bias included, is above 40 nats: sums of 2^t need no running maximum
  bool in_tile;    // positives are found in the tiles; otherwise they are aligned, and forward only says their logit
  Rules rules;
};

constexpr int PITCH = 16;  // floats: one vector of the widest unit

// Results of forward for every row of one side, where metrics are asked for; otherwise null pointers.
struct Metrics {
  const float* low;   // never nan. A negative ties with the threshold where low <= t <= high, and is above it unless t <= high:
  const float* high;  // tied() in fastnce/problem.py
  int64_t* rank;
  int64_t* ties;
  float* hardest_t;
  int64_t* hardest;
};

// Sums of forward for every row of one side. Where unshifted, top_* are not touched; where !in_tile, those of the positives and n_pos.
struct Sums {
  double* negative;
  float* top_negative;
  double* positive;
  float* top_positive;
  double* pos;
  int64_t* n_pos;
  Metrics metrics;
};

// w_ij = negative_i 2^(t - base_negative_i) for a negative, positive_i 2^(t - base_positive_i) + mean_i for a positive. Where unshifted,
// 2^-base is inside the coefficient.
struct Weights {
  const float* negative;
  const float* base_negative;
  const float* positive;
  const float* base_positive;
  const float* mean;
};

struct Wanted {
  float* dx;       // (m, pitch), zeroed; null where not wanted
  float* dy;       // (n, pitch); dx where symmetric
  double* moment;  // (m,): sum_j w_ij (t_ij - center) of row i's tiles; null where not wanted
  float center;
};

// body(begin, end, thread) over [0, count), by at most `threads` threads.
struct Pool {
  int threads;
  std::function<void(int64_t count, const std::function<void(int64_t, int64_t, int)>& body)> run;
};

struct Level {
  const char* name;
  // best[side] (rows of the side,) = max(best[side], largest positive t); nan where one of them is. best[1] only where two_sided.
  void (*best_positives)(const Problem&, float* const best[2], const Pool&);
  void (*forward)(const Problem&, const Sums sides[2], const Pool&);
  void (*backward)(const Problem&, const Weights sides[2], const Wanted&, const Pool&);
};

// The widest level that this processor has; FASTNCE_CPU_LEVEL names a narrower one.
const Level& best_level();

// All levels that this processor has, narrowest first.
std::vector<const Level*> levels();

}  // namespace fastnce
