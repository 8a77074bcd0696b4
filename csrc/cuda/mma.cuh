// The walk of the mma.sync kernels over their tiles, for every GPU from sm_80 on. A block of four warps computes BM rows of the logits, and
// walks over the columns, BN at a time.
//
// Shared memory has two stages: one is multiplied while the next is copied. Where rows fit (S::FITS), a stage is BN rows of y~, and x~
// stays. Of longer rows a stage is a chunk of 64 columns of both.
#pragma once

#include "tile.cuh"

namespace fastnce::cuda {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

// Operands of PARTS float16 numbers and DEPTH columns (0: rows of any length, in chunks); MT strips of 16 rows for each warp, BN columns a
// tile.
template <int DEPTH_, int PARTS_, int MT_, int BN_>
struct Shape {
  static constexpr int DEPTH = DEPTH_, PARTS = PARTS_, MT = MT_;
  static constexpr bool FITS = DEPTH > 0;
  static constexpr int CHUNK = FITS ? DEPTH : GROUP;
  static constexpr int BM = 16 * WARPS * MT, BN = BN_, NB = BN / 8;
  static constexpr int X_BYTES = BM * CHUNK * PARTS * 2, Y_BYTES = BN * CHUNK * PARTS * 2;
};

template <class S, int FIELDS>
struct Shared {
  static constexpr int STAGES = 2;
  static constexpr int X_STAGES = S::FITS ? 1 : STAGES;
  static constexpr int COLUMNS = FIELDS * S::BN;  // floats
  static constexpr int BYTES = X_STAGES * S::X_BYTES + STAGES * (S::Y_BYTES + 4 * COLUMNS);

  char* base;
  FASTNCE_DEVICE char* x(int stage) const { return base + stage % X_STAGES * S::X_BYTES; }
  FASTNCE_DEVICE char* y(int stage) const { return base + X_STAGES * S::X_BYTES + stage % STAGES * S::Y_BYTES; }
  FASTNCE_DEVICE Columns<S::BN> columns(int tile) const {
    return {reinterpret_cast<float*>(base + X_STAGES * S::X_BYTES + STAGES * S::Y_BYTES) + tile % STAGES * COLUMNS};
  }
};

// Copies ROWS rows from `first` and CHUNK columns from `column` of an operand.
template <int ROWS, int CHUNK, int PARTS>
FASTNCE_DEVICE void load_rows(char* to, const uint16_t* operand, int64_t first, int column, int depth) {
  constexpr int UNITS = CHUNK / UNIT;
  static_assert(ROWS * UNITS % THREADS == 0);
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
  // Unrolled, the addresses of all copies would stay in registers that gradients need.
#pragma unroll 1
    for (int at = thread_index(); at < ROWS * UNITS; at += THREADS) {
      const int row = at / UNITS, unit = at % UNITS;
      const uint16_t* from = operand + ((first + row) * PARTS + part) * depth + column + unit * UNIT;
      copy_async(to + part * ROWS * CHUNK * 2 + unit_byte(row, unit, ROWS), from);
    }
}

template <int BN, int FIELDS>
FASTNCE_DEVICE void load_columns(const Columns<BN>& to, const Vectors<FIELDS>& vectors, int j0) {
  constexpr int UNITS = BN / 4;
#pragma unroll
  for (int f = 0; f < FIELDS; ++f) {
    // The empty asm hides the value of turn. Otherwise nvcc puts the thread's own number in the place of f, where both are equal, and the
    // pointers into an array in local memory (seen for compute_100).
    int turn = f % (THREADS / UNITS);
    asm("" : "+r"(turn));
    if (vectors.of[f] && thread_index() / UNITS == turn) {
      const int unit = thread_index() % UNITS;
      copy_async(reinterpret_cast<char*>(to.field(static_cast<Field>(f)) + 4 * unit),
                 static_cast<const float*>(vectors.of[f]) + j0 + 4 * unit);
    }
  }
}

// c += x~ y~' of a stage. In two parts the small terms come first; the product of both low halves is below float32's rounding and left out.
template <class S>
FASTNCE_DEVICE void multiply(Strip<S::NB> (&c)[S::MT], const char* x, const char* y) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  // Unrolling all 16 steps gains nothing, and compiles for minutes.
#pragma unroll 4
  for (int k = 0; k < S::CHUNK / 16; ++k) {
    uint32_t a[S::MT][S::PARTS][4];
#pragma unroll
    for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
      for (int part = 0; part < S::PARTS; ++part)
        ldmatrix(a[mt][part],
                 x + part * S::BM * S::CHUNK * 2 + unit_byte((warp * S::MT + mt) * 16 + a_row(lane), 2 * k + a_unit(lane), S::BM));
#pragma unroll
    for (int nb = 0; nb < S::NB; nb += 2) {
      uint32_t b[S::PARTS][4];
#pragma unroll
      for (int part = 0; part < S::PARTS; ++part)
        ldmatrix(b[part], y + part * S::BN * S::CHUNK * 2 + unit_byte(nb * 8 + b_row(lane), 2 * k + b_unit(lane), S::BN));
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
        for (int two = 0; two < 2; ++two) {
          if constexpr (S::PARTS == 2) {
            mma(c[mt][nb + two], a[mt][1], b[0][2 * two], b[0][2 * two + 1]);
            mma(c[mt][nb + two], a[mt][0], b[1][2 * two], b[1][2 * two + 1]);
          }
          mma(c[mt][nb + two], a[mt][0], b[0][2 * two], b[0][2 * two + 1]);
        }
    }
  }
}

// For each of `count` tiles: its products, then body(tile, j0, products, columns, y), and when all threads have done that, after(tile, j0).
// column_of(tile) is the first column of a tile.
template <class S, int FIELDS, class ColumnOf, class Body, class After>
FASTNCE_DEVICE void for_each_tile(const Problem& p, const Vectors<FIELDS>& vectors, char* memory, int i0, int count,
                                  const ColumnOf& column_of, const Body& body, const After& after) {
  const Shared<S, FIELDS> shared{memory};
  const int chunks = S::FITS ? 1 : p.depth / S::CHUNK, depth = S::FITS ? S::DEPTH : p.depth, stages = count * chunks;
  if (stages == 0) return;
  const auto load = [&](int stage) {
    const int tile = stage / chunks, chunk = stage % chunks, j0 = column_of(tile);
    if (!S::FITS || stage == 0) load_rows<S::BM, S::CHUNK, S::PARTS>(shared.x(stage), p.x, i0, chunk * S::CHUNK, depth);
    load_rows<S::BN, S::CHUNK, S::PARTS>(shared.y(stage), p.y, j0, chunk * S::CHUNK, depth);
    if (chunk == 0) load_columns<S::BN>(shared.columns(tile), vectors, j0);
    copy_commit();
  };
  load(0);
  Strip<S::NB> c[S::MT] = {};
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      load(stage + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    sync_block();
    if constexpr (S::FITS) {
      multiply<S>(c, shared.x(stage), shared.y(stage));
    } else {
      // Tensor cores round every sum towards zero: from the dot product of two like rows, in two parts, they take some 2^-28 D of it. At a
      // thousand columns that is more than a logit may be off. So they sum one chunk, and the chunk is added here.
      Strip<S::NB> of_chunk[S::MT] = {};
      multiply<S>(of_chunk, shared.x(stage), shared.y(stage));
#pragma unroll
      for (int mt = 0; mt < S::MT; ++mt)
#pragma unroll
        for (int nb = 0; nb < S::NB; ++nb)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[mt][nb][e] += of_chunk[mt][nb][e];
    }
    const int tile = stage / chunks;
    const bool last = stage % chunks == chunks - 1;
    if (last) body(tile, column_of(tile), c, shared.columns(tile), shared.y(stage));
    // From here on the stage after the next may be loaded: no thread still reads its memory.
    sync_block();
    if (last) {
      after(tile, column_of(tile));
#pragma unroll
      for (auto& strip : c)
#pragma unroll
        for (auto& block : strip)
#pragma unroll
          for (float& value : block) value = 0.0f;
    }
  }
}

// The rows of this thread's strips, in a block that starts at i0.
template <class S>
FASTNCE_DEVICE void load_strips(Rows (&rows)[S::MT], const Problem& p, int i0, float multiplier) {
#pragma unroll
  for (int mt = 0; mt < S::MT; ++mt) rows[mt] = Rows::load(p, i0 + (thread_index() / 32 * S::MT + mt) * 16, multiplier);
}

}  // namespace fastnce::cuda
