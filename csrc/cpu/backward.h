// Backward of one block of the logits: its weights, and their two products with the rows. docs/math.md has the formulas:
//
//     w_ij = part of row i + part of column j,    dx_i += sum_j w_ij y_j,    dy_j += sum_i w_ij x_i
#pragma once

#include "tile.h"

namespace fastnce::FASTNCE_LEVEL {

// ---------------------------------------------------------------- weights

// Adds the weights of one register block to w, or stores them where it is the first to come. SOME: t is -inf for all pairs but those of one
// kind, and the others get no weight. weight(-inf) is 0, but the coefficient of a row may be nan, and 0 * nan is nan.
template <bool SHIFTED, bool COLUMNS, bool SOME>
FASTNCE_INLINE void add_weights(const float* t, int count, const float* of_row, const float* row_base, const float* of_column,
                                const float* column_base, float* w, int64_t ldw, bool first) {
  for (int v = 0; v < NV; ++v) {
    const Vec column = COLUMNS ? load(of_column + v * LANES) : Vec{}, base = COLUMNS && SHIFTED ? load(column_base + v * LANES) : Vec{};
    for (int m = 0; m < count; ++m) {
      const Vec logit = load(t + m * NR + v * LANES);
      Vec value;
      if constexpr (SHIFTED) {
        value = all(of_row[m]) * weight(logit, all(row_base[m]));
        if constexpr (COLUMNS) value += column * weight(logit, base);
      } else {
        value = weight(logit) * (COLUMNS ? column + of_row[m] : all(of_row[m]));
      }
      if constexpr (SOME) value = logit == NONE ? Vec{} : value;
      store(w + m * ldw + v * LANES, first ? value : load(w + m * ldw + v * LANES) + value);
    }
  }
}

// Coefficients of the columns of one panel, padded to full vectors.
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

// The weights w of a block, (i.size() rounded up to MR, ldw). Outside of the block they are zero.
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
      logits(p, panels, own, column, t);
      float* out = w + (row - i.begin) * ldw + (column - j.begin);
      if (__builtin_expect(here.size() == NR && all_negative(p, own, here), 1)) {
        add_weights<SHIFTED, COLUMNS, false>(with_bias(p, t, count, kept), count, rows.negative + row, rows.base_negative + row,
                                             by_column.negative, by_column.base_negative, out, ldw, true);
      } else {
        const bool some = classify(p, own, here, kind);
        keep(t, kind, NEGATIVE, count, kept);
        add_weights<SHIFTED, COLUMNS, true>(with_bias(p, kept, count, kept), count, rows.negative + row, rows.base_negative + row,
                                            by_column.negative, by_column.base_negative, out, ldw, true);
        if (p.in_tile && some) {
          keep(t, kind, POSITIVE, count, kept);
          add_weights<SHIFTED, COLUMNS, true>(with_bias(p, kept, count, kept), count, rows.positive + row, rows.base_positive + row,
                                              by_column.positive, by_column.base_positive, out, ldw, false);
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

// ---------------------------------------------------------------- products

// c (rows, VECTORS vectors) += a b. a is (rows, depth), or its transpose where BY_COLUMN; b is (depth, ldb).
//
// The product is summed from zero, and then added to c. If each of its terms were added to c, which may be the sum over thousands of
// columns, each would be rounded like a number of that size, and errors would grow with the square root of the number of columns.
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

// c (rows, pitch) += a b for all columns of b (depth, pitch). NR columns of b at a time are copied into `panel`, where they follow each
// other.
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
