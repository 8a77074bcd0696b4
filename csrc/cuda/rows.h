// Passes over single rows, O(N D), for bind.cpp. rows.cuh has the formulas.
#pragma once

#include "launch.h"

namespace fastnce::cuda {

enum class ElementType { FLOAT, HALF, BFLOAT16 };

// Rows as the caller has them: neighbours in a row are neighbours in memory, rows are `stride` elements apart.
struct RawRows {
  const void* data;
  int64_t stride;
  int rows, columns;
  ElementType type;
};

// The results of prepare, which tiles, aligned and finish read.
struct Operand {
  uint16_t* tiles;      // (padded, parts, depth) float16
  float* factor;        // (padded,)
  float* inverse_norm;  // (rows,)
  int padded, parts, depth;
};

struct Aligned {
  const float* r_x;  // inverse norms
  const float* r_y;
  const float* scale;
  int first_row, first_column, pairs;
  float* t;  // (pairs,)
};

struct Finish {
  const float* dx;  // (splits, rows.., columns..)
  int64_t dx_split, dx_row;
  int splits;
  const float* r_x;
  const float* r_y;
  const float* pair;  // (rows,)
  const float* scale;
  const float* lift;
  int up, down;  // diagonals j - i
  bool normalize;
  void* out;  // (rows, columns), of the input's type
};

// Whether there is machine code for the current device, and its driver takes it.
bool has_code();

void prepare(const RawRows& x, const Operand& out, bool normalize, Stream);
void aligned(const RawRows& x, const RawRows& y, const Aligned& of, Stream);
void finish(const RawRows& x, const RawRows& y, const Finish& of, Stream);

}  // namespace fastnce::cuda
