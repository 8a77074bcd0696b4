// The gradient by mma.sync: compute the logits of a tile again, turn them into weights, multiply the weights with the rows.
#pragma once

#include "accumulate.cuh"
#include "mma.cuh"

namespace fastnce::cuda {

// unshifted() for the coefficients of the columns: once for a tile, not for every pair. All threads must come here.
template <int BN, class W>
FASTNCE_DEVICE void prepare_columns(const Columns<BN>& columns, const W& weigher) {
  if (!weigher.one_exponential) return;
  for (int column = thread_index(); column < BN; column += THREADS) {
    columns.field(FACTOR)[column] *= exp2_fast(-columns.field(BASE)[column]);
    if (weigher.in_tile) columns.field(FACTOR_POS)[column] *= exp2_fast(-columns.field(BASE_POS)[column]);
  }
  sync_block();
}

// dx = sum_j w_ij beta_j y~_j over the tiles of a split. Rows fit into shared memory.
template <class S, bool CONTENT>
FASTNCE_KERNEL(THREADS, 1)
backward_rows(const Problem p, const Grid grid, const Weights weights, const RowGradient out) {
  static_assert(S::FITS && S::MT == 1);
  // Tensor cores round every sum towards zero: over n columns they take some 2^-29 n of it, at a thousand more than float32 may lose. So in
  // two parts they sum one tile, and the tile is added to dx.
  constexpr bool APART = S::PARTS == 2;
  const Rules& r = p.rules;
  const int block = block_index() / grid.splits, split = block_index() % grid.splits, i0 = block * S::BM;
  const Range tiles = split_range(split, grid.per_split, ceil_div(r.columns, S::BN));
  auto weigher = Weigher<CONTENT, S::PARTS>::load(p, weights);
  const int first = i0 + thread_index() / 32 * 16;
  float moment[2] = {};
  float dx[S::DEPTH / 8][4] = {};
  for_each_tile<S>(
      p, column_vectors<BACKWARD_FIELDS<CONTENT>>(p, weights.column), shared_memory(), i0, tiles.end - tiles.begin,
      [&](int n) { return (tiles.begin + n) * S::BN; },
      [&](int, int j0, Strip<S::NB>(&c)[1], const Columns<S::BN>& columns, const char* y) {
        const int lane = thread_index() % 32;
        prepare_columns(columns, weigher);
        // The rows are loaded again for every tile: the products below need all registers.
        const Rows rows = Rows::load(p, first, weigher.row_multiplier());
        weigher.load_rows(p, weights, rows);
        const Kinds kinds = kinds_of<S::NB, CONTENT>(r, rows, i0, S::BM, j0, columns);
        weigher.template weigh<S::NB>(AnyTerms{}, c[0], rows, columns, kinds, moment);
        // The left operand of the second product: registers 0, 1 of it are the accumulators of one block of columns, 2, 3 those of the
        // next.
        const auto operand = [&](int nb, uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
          for (int two = 0; two < 2; ++two)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float g[2];
#pragma unroll
              for (int e = 0; e < 2; ++e)
                g[e] = c[0][nb + two][2 * h + e] * finite(columns.value(BETA, (nb + two) * 8 + fragment_column(lane, e)));
              halves(g[0], g[1], high[2 * two + h], low[2 * two + h]);
            }
        };
        const auto add = [&](float (*sum)[4], int nb, int d, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
          uint32_t b[S::PARTS][4];
#pragma unroll
          for (int part = 0; part < S::PARTS; ++part)
            ldmatrix_transposed(b[part], y + part * S::BN * S::CHUNK * 2 + unit_byte(nb * 8 + bt_row(lane), d + bt_unit(lane), S::BN));
#pragma unroll
          for (int two = 0; two < 2; ++two) {
            if constexpr (S::PARTS == 2) {
              mma(sum[two], low, b[0][2 * two], b[0][2 * two + 1]);
              mma(sum[two], high, b[1][2 * two], b[1][2 * two + 1]);
            }
            mma(sum[two], high, b[0][2 * two], b[0][2 * two + 1]);
          }
        };
        if constexpr (APART) {
          uint32_t high[S::NB / 2][4], low[S::NB / 2][4];
#pragma unroll
          for (int nb = 0; nb < S::NB; nb += 2) operand(nb, high[nb / 2], low[nb / 2]);
#pragma unroll
          for (int d = 0; d < S::DEPTH / 8; d += 2) {
            Strip<2> of_tile = {};
#pragma unroll
            for (int nb = 0; nb < S::NB; nb += 2) add(of_tile, nb, d, high[nb / 2], low[nb / 2]);
#pragma unroll
            for (int two = 0; two < 2; ++two)
#pragma unroll
              for (int e = 0; e < 4; ++e) dx[d + two][e] += of_tile[two][e];
          }
        } else {
#pragma unroll
          for (int nb = 0; nb < S::NB; nb += 2) {
            uint32_t high[4], low[4];
            operand(nb, high, low);
#pragma unroll
            for (int d = 0; d < S::DEPTH / 8; d += 2) add(dx + d, nb, d, high, low);
          }
        }
      },
      [](int, int) {});
  store_gradient(p, out, split, first, dx, moment);
}

// Stores a strip, times a factor for every pair, as float16 into a block that starts at `to`.
template <class S, class Factor>
FASTNCE_DEVICE void store_strip(uint16_t* to, int64_t pitch, const Strip<S::NB>& w, const Factor& factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint16_t* row = to + fragment_row(thread_index() % 32, 2 * h) * pitch + fragment_column(thread_index() % 32, 0);
#pragma unroll
    for (int nb = 0; nb < S::NB; ++nb) {
      uint32_t high, low;
      halves(w[nb][2 * h] * factor(h, nb, 0), w[nb][2 * h + 1] * factor(h, nb, 1), high, low);
      *reinterpret_cast<uint32_t*>(row + nb * 8) = high;
      if (S::PARTS == 2) *reinterpret_cast<uint32_t*>(row + pitch * pitch + nb * 8) = low;
    }
  }
}

// The weights of a block of pairs, one tile for each program. Rows have any length.
template <class S, bool CONTENT>
FASTNCE_KERNEL(THREADS, 1)
weights_block(const Problem p, const Weights weights, const Block out) {
  const Rules& r = p.rules;
  const int across = block_index() % out.across, i0 = out.row0 + block_index() / out.across * S::BM, first = out.column0 + across * S::BN;
  auto weigher = Weigher<CONTENT, S::PARTS>::load(p, weights);
  Rows rows[S::MT];
  load_strips<S>(rows, p, i0, weigher.row_multiplier());
  for_each_tile<S>(
      p, column_vectors<BACKWARD_FIELDS<CONTENT>>(p, weights.column), shared_memory(), i0, 1, [&](int) { return first; },
      [&](int, int j0, Strip<S::NB>(&c)[S::MT], const Columns<S::BN>& columns, const char*) {
        const int lane = thread_index() % 32;
        prepare_columns(columns, weigher);
#pragma unroll
        for (int mt = 0; mt < S::MT; ++mt) {
          weigher.load_rows(p, weights, rows[mt]);
          float moment[2] = {};
          const Kinds kinds = kinds_of<S::NB, CONTENT>(r, rows[mt], i0, S::BM, j0, columns);
          weigher.template weigh<S::NB>(AnyTerms{}, c[mt], rows[mt], columns, kinds, moment);
          const int row = rows[mt].i[0] - fragment_row(lane, 0) - out.row0;
          const int64_t to = static_cast<int64_t>(row) * out.pitch + (first - out.column0);
          if (out.for_rows)
            store_strip<S>(out.for_rows + to, out.pitch, c[mt],
                           [&](int, int nb, int e) { return finite(columns.value(BETA, nb * 8 + fragment_column(lane, e))); });
          if (out.for_columns) {
            const float a[2] = {finite(p.a[rows[mt].i[0]]), finite(p.a[rows[mt].i[1]])};
            store_strip<S>(out.for_columns + to, out.pitch, c[mt], [&](int h, int, int) { return a[h]; });
          }
          if (!out.moment) continue;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float all = quad_sum(moment[h]);
            if (first_of_quad()) out.moment[static_cast<int64_t>(across) * out.pitch + (rows[mt].i[h] - out.row0)] = all;
          }
        }
      },
      [](int, int) {});
}

}  // namespace fastnce::cuda
