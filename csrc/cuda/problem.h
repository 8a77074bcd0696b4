// The arguments of the kernels: raw pointers and sizes, no torch. docs/math.md has the formulas, fastnce/pairs.py the rules of the pairs.
//
//     t_ij = alpha_i beta_j <x~_i, y~_j>      alpha_i = log2(e) scale a_i,  beta_j = b_j:  the logit in base 2 and without the bias
#pragma once

#include <cstdint>

namespace fastnce::cuda {

// The rules of the pairs. Ids are padded like the operands. An id that matches nothing differs between the sides.
struct Rules {
  const int* q_label;
  const int* k_label;
  const int* q_exclude;
  const int* k_exclude;
  const uint8_t* mask;  // (mask_rows, mask_columns), row i meets mask row i % mask_rows
  int mask_rows, mask_columns;
  int64_t mask_row, mask_column;  // strides
  int rows, columns;              // of the logits
  int own, up, down;              // diagonals j - i: self, aligned, aligned mirrored
  bool in_tile;                   // positives are found in the tiles; otherwise they are the aligned pairs, and counted elsewhere

  bool by_content() const { return in_tile || q_exclude; }
};

struct Problem {
  const uint16_t* x;  // (row_padded, parts, depth) float16: rows times a power of two, float32 in a high and a low part
  const uint16_t* y;  // (column_padded, parts, depth)
  const float* a;     // (row_padded,): normalised row = a * x~
  const float* b;     // (column_padded,)
  const float* scale;
  const float* bound;  // no |logit| without bias is larger
  int row_padded, column_padded, parts, depth;
  Rules rules;
};

// Programs: row blocks times splits of their columns. The sums of the splits are added afterwards, in their order.
struct Grid {
  int splits, per_split;
};

// (2 or 5, splits, rows): top and total of the negatives; in_tile: of the positives, and their sum of t.   count: (splits, rows)
struct RowSums {
  float* sums;
  int* count;
  bool always;  // false: the kernel runs only where forward_both must not
};

// (1 or 3, rows): sum of 2^t over the negatives; in_tile: over the positives, and their sum of t.   count: (rows,)
struct BothSums {
  float* row;
  int* row_count;
  float* column;
  int* column_count;
  bool symmetric;
};

struct Retrieval {
  const float* bounds;  // (2, rows): low, high; neither is nan
  float* largest;       // (2, splits, rows): largest t of the negatives, of the positives
  int* counts;          // (3, splits, rows): negatives unless t <= high, and with low <= t <= high; column of the largest negative
};

// w_ij = factor_i 2^(t - base_i) for a negative, factor_pos_i 2^(t - base_pos_i) + share_i for a positive, plus the same of column j.
struct Weights {
  const float* row;     // (2 or 5, row_padded): base, factor, base_pos, factor_pos, share
  const float* column;  // (2 or 5, column_padded)
  const float* center;
  bool of_rows, of_columns;
};

struct RowGradient {
  float* dx;      // (splits, row_padded, depth) = sum_j w_ij beta_j y~_j
  float* moment;  // (splits, rows) = sum_j w_ij (t_ij - center), or null
};

// The weights of a block of pairs, for two plain matrix products.
struct Block {
  int row0, column0, down, across;  // the corner, and the number of tiles down and across
  int pitch;
  uint16_t* for_rows;     // (parts, pitch, pitch): w_ij beta_j, or null
  uint16_t* for_columns;  // w_ij a_i, or null
  float* moment;          // (across, pitch): per row of the block, sum over a tile of w_ij (t_ij - center), or null
};

}  // namespace fastnce::cuda
