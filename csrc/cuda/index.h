// Where things are: swizzled shared memory, which element a thread of a warp holds, in which order tiles are visited, how they are split.
// Plain arithmetic for host and device; tests/native/index.cpp goes through all of it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTNCE_HD __host__ __device__ __forceinline__ constexpr
#else
#define FASTNCE_HD inline constexpr
#endif

namespace fastnce::cuda {

// ---------------------------------------------------------------- shared memory

// A tile of float16 rows lies in shared memory in groups of 64 columns, 128 bytes of every row behind each other, and the eight 16-byte
// units of those are permuted by the row. Eight rows of one column of units are then in all 32 banks, for ldmatrix and for copies; it is
// also what TMA writes and wgmma reads as its 128-byte swizzle, so that both families of kernels share it.
constexpr int GROUP = 64;                               // columns
constexpr int UNIT = 8;                                 // columns of one 16-byte unit
constexpr int GROUP_BYTES = 2 * GROUP;                  // of one row
constexpr int SWIZZLE_ROWS = 8;                         // after which the permutation repeats
constexpr int ATOM_BYTES = SWIZZLE_ROWS * GROUP_BYTES;  // what must be aligned for it

// Byte of unit `unit` (8 columns) of row `row`, in a tile of `rows` rows.
FASTNCE_HD int unit_byte(int row, int unit, int rows) {
  return (unit / 8 * rows + row) * GROUP_BYTES + ((unit % 8) ^ (row % SWIZZLE_ROWS)) * 16;
}

// ---------------------------------------------------------------- who holds what

// Accumulators of mma.m16n8k16, and of wgmma for each of its warps: entry e (0..3) of a lane, in 16 x 8 elements. PTX ISA, "Matrix
// fragments for mma.m16n8k16" and "Register fragments for wgmma.mma_async.m64nNk16".
FASTNCE_HD int fragment_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
FASTNCE_HD int fragment_column(int lane, int e) { return lane % 4 * 2 + e % 2; }

// ldmatrix.x4 reads four 8 x 8 matrices, whose rows lanes 0..7, 8..15, 16..23, 24..31 point to. For A (16 x 16) they are the quadrants
// top left, bottom left, top right, bottom right; for B that is stored by its columns (n, k), two blocks of 8 columns by two halves of k;
// for B that is stored by its rows (k, n) and transposed on the way, two halves of k by two blocks of 8 columns. (row, unit) from the
// corner:
FASTNCE_HD int a_row(int lane) { return lane % 16; }
FASTNCE_HD int a_unit(int lane) { return lane / 16; }
FASTNCE_HD int b_row(int lane) { return lane % 8 + lane / 16 * 8; }
FASTNCE_HD int b_unit(int lane) { return lane / 8 % 2; }
FASTNCE_HD int bt_row(int lane) { return lane % 16; }
FASTNCE_HD int bt_unit(int lane) { return lane / 16; }

// Sums of `columns` numbers over the eight lanes that hold the same columns, halving what a lane holds with each exchange: afterwards a
// lane has columns / 8 of them, from this one on, counted as (block of 8) * 2 + (0 or 1).
FASTNCE_HD int scattered_first(int lane, int columns) { return lane / 4 * (columns / 8); }

// ---------------------------------------------------------------- which tiles

FASTNCE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
};

// Tiles of one split of a row block.
FASTNCE_HD Range split_range(int split, int per_split, int tiles) {
  const int64_t begin = static_cast<int64_t>(split) * per_split, end = begin + per_split;
  return {static_cast<int>(begin < tiles ? begin : tiles), static_cast<int>(end < tiles ? end : tiles)};
}

// Where the keys are the queries, row block I visits the column blocks I, I + 1, ... round the circle, half of them: every block row has as
// many, and a tile also stands for its mirror image. Of an even number of blocks, those half way round would be met from both ends.
FASTNCE_HD int circle_steps(int block, int blocks) { return blocks % 2 == 0 && block >= blocks / 2 ? blocks / 2 : blocks / 2 + 1; }
FASTNCE_HD int circle_block(int block, int step, int blocks) { return block + step >= blocks ? block + step - blocks : block + step; }

// Whether the line j - i == diagonal crosses rows i0.. and columns j0.. of a tile. 64 bits: the diagonal that is not there is 2^31 - 1.
FASTNCE_HD bool meets(int i0, int j0, int rows, int columns, int diagonal) {
  const int64_t local = static_cast<int64_t>(j0) - i0 - diagonal;
  return local < rows && local > -columns;
}

// ---------------------------------------------------------------- in which order, where most tiles are alike

// A diagonal crosses at most five tiles of a block of 128 rows, of 32 columns each; there are three of them, and a last tile that is
// ragged.
constexpr int MOST_MASKED = 16;
constexpr int NOWHERE = 2147483647;  // a diagonal that no pair of indices lies on

// Steps begin..begin + count of a walk: first, in ascending order, those whose pairs are all negative, then the others. Kernels that
// overlap products with exponentials do so over the former, in a loop without a branch.
struct Order {
  int begin, count, plain, extra;
  int masked[MOST_MASKED];

  FASTNCE_HD int at(int n) const {
    if (n >= plain) return extra ? masked[n - plain] : begin + n;
    int step = begin + n;
    for (int k = 0; k < extra; ++k) step += step >= masked[k];
    return step;
  }

  FASTNCE_HD void insert(int step) {
    if (step < begin || step >= begin + count) return;
    int at = 0;
    while (at < extra && masked[at] < step) ++at;
    if (at < extra && masked[at] == step) return;
    for (int k = extra; k > at; --k) masked[k] = masked[k - 1];
    masked[at] = step;
    ++extra;
    --plain;
  }
};

// Rows i0..i0 + rows; tiles of `width` columns. circle: steps count from column block `first` on, round the circle.
FASTNCE_HD void set_order(Order& order, Range steps, bool all_masked, int i0, int rows, int width, int columns, bool circle, int first,
                          int own, int up, int down) {
  const int across = ceil_div(columns, width);
  order.begin = steps.begin;
  order.count = steps.end > steps.begin ? steps.end - steps.begin : 0;
  order.plain = all_masked ? 0 : order.count;
  order.extra = 0;
  if (all_masked) return;
  const auto insert = [&](int tile) { order.insert(!circle ? tile : tile >= first ? tile - first : tile - first + across); };
  for (int which = 0; which < 3; ++which) {
    const int diagonal = which == 0 ? own : which == 1 ? up : down;
    if (diagonal == NOWHERE) continue;
    const int64_t low = static_cast<int64_t>(i0) + diagonal, high = low + rows - 1;
    if (high < 0 || low >= columns) continue;
    const int last = static_cast<int>(high < columns ? high : columns - 1) / width;
    for (int tile = low < 0 ? 0 : static_cast<int>(low) / width; tile <= last; ++tile) insert(tile);
  }
  if (columns % width) insert(across - 1);
}

}  // namespace fastnce::cuda
