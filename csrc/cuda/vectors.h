// Arithmetic with one number per row, O(N) in float64, for bind.cpp: one launch instead of some 40 small ones. vectors.cuh has the
// formulas.
#pragma once

#include "launch.h"

namespace fastnce::cuda {

// Statistics of one side from the sums of its tiles. Where aligned pairs are kept out of the tiles, each has one or two ends in its rows.
struct Statistics {
  const float* sums;  // (2 or 5, splits, rows), see RowSums; in_tile: 5
  const int* count;
  const float* unshifted;  // (1 or 3, rows), see BothSums, or null
  const int* unshifted_count;
  const float* pairs;  // (pair_count,): t
  int pair_count, ends, end[2];
  const float* bias;  // or null
  int splits, rows;
  bool in_tile;
  double *lse_neg, *lse_pos, *pos;
  int64_t* n_pos;
  double *own_neg, *own_pos;
};

// The rows, or the columns, of the backward pass.
struct SideOf {
  const double *dlse_neg, *dlse_pos, *dpos;
  const double *lse_neg, *lse_pos, *pos;
  const int64_t* n_pos;
  const double *own_neg, *own_pos;
  float* vectors;  // (2 or 5, padded): see Weights
  int rows, padded;
};

struct Contributions {
  SideOf side[2];
  int sides;
  const float* factor[2];  // of the operands of the rows and of the columns
  int factors[2];
  const float* bias;
  const double* pair_t;  // of the aligned pairs (first[0] + p, first[1] + p), or null
  float* pair_weights;
  int pairs, first[2];
  bool in_tile, symmetric;
  double* scalars;  // (4,): lift, center, due, moment
};

constexpr int MOST_PARTS = 4;

struct ScaleGradient {
  const double* scalars;
  const float* about[MOST_PARTS];
  int64_t count[MOST_PARTS];
  int parts;
  double divide;
  const float* scale;
  float *dscale, *dbias;
};

// The number of doubles that coefficients() needs for the sums of its blocks; 0 where there is one block.
int64_t scratch_of(const Contributions&);

void statistics(const Statistics&, Stream);
void coefficients(const Contributions&, double* scratch, Stream);
void scale_gradient(const ScaleGradient&, Stream);

}  // namespace fastnce::cuda
