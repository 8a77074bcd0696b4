// Arithmetic with indices, for host and device: the swizzle of shared memory, the elements that a thread holds, the splits of the tiles and
// the order in which they are visited. tests/native/index.cpp tests every value.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTNCE_HD __host__ __device__ __forceinline__ constexpr
#else
#define FASTNCE_HD inline constexpr
#endif

namespace fastnce::cuda {

// ---------------------------------------------------------------- shared memory

// A tile of float16 rows lies in shared memory in groups of 64 columns: 128 bytes of one row after those of another. The eight 16-byte
// units of these 128 bytes are permuted by the row. So one unit of eight rows is in all 32 banks, for ldmatrix and for copies. TMA writes
// this permutation, and wgmma reads it, as their 128-byte swizzle: both families of kernels share it.
constexpr int GROUP = 64;                               // columns
constexpr int UNIT = 8;                                 // columns of one 16-byte unit
constexpr int GROUP_BYTES = 2 * GROUP;                  // of one row
constexpr int SWIZZLE_ROWS = 8;                         // after which the permutation repeats
constexpr int ATOM_BYTES = SWIZZLE_ROWS * GROUP_BYTES;  // the alignment that it needs

// The byte at which a unit (8 columns) of a row begins, in a tile of `rows` rows.
FASTNCE_HD int unit_byte(int row, int unit, int rows) {
  return (unit / 8 * rows + row) * GROUP_BYTES + ((unit % 8) ^ (row % SWIZZLE_ROWS)) * 16;
}

// ---------------------------------------------------------------- elements of a thread

// The place of entry e (0..3) of a lane in the 16 x 8 accumulators of mma.m16n8k16, and of each warp of wgmma. PTX ISA, "Matrix fragments
// for mma.m16n8k16" and "Register fragments for wgmma.mma_async.m64nNk16".
FASTNCE_HD int fragment_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
FASTNCE_HD int fragment_column(int lane, int e) { return lane % 4 * 2 + e % 2; }

// The row and unit, from the corner of a block, to which a lane points for ldmatrix.x4. It reads four 8 x 8 matrices, whose rows lanes
// 0..7, 8..15, 16..23 and 24..31 point to:
//     a    A (16 x 16): the quadrants top left, bottom left, top right, bottom right
//     b    B, stored by its columns (n, k): two blocks of 8 columns by two halves of k
//     bt   B, stored by its rows (k, n) and transposed by the instruction: two halves of k by two blocks of 8 columns
FASTNCE_HD int a_row(int lane) { return lane % 16; }
FASTNCE_HD int a_unit(int lane) { return lane / 16; }
FASTNCE_HD int b_row(int lane) { return lane % 8 + lane / 16 * 8; }
FASTNCE_HD int b_unit(int lane) { return lane / 8 % 2; }
FASTNCE_HD int bt_row(int lane) { return lane % 16; }
FASTNCE_HD int bt_unit(int lane) { return lane / 16; }

// scatter_sums in tile.cuh adds `columns` numbers over the eight lanes that hold the same columns; a lane keeps half of its numbers at each
// exchange. Afterwards it has columns / 8 of the sums, from this one on. Column c % 2 of a lane's two in block c / 2 counts as c.
FASTNCE_HD int scattered_first(int lane, int columns) { return lane / 4 * (columns / 8); }

// ---------------------------------------------------------------- tiles of a walk

FASTNCE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
};

// The tiles of one split of a row block.
FASTNCE_HD Range split_range(int split, int per_split, int tiles) {
  const int64_t begin = static_cast<int64_t>(split) * per_split, end = begin + per_split;
  return {static_cast<int>(begin < tiles ? begin : tiles), static_cast<int>(end < tiles ? end : tiles)};
}

// Where the keys are the queries, a tile also stands for its mirror image. Row block I visits the column blocks I, I + 1, ... half way
// round the circle, so that all row blocks have the same number of tiles. With an even number of blocks, the tile half way round would be
// met from both ends: the second half of the row blocks leaves it out.
FASTNCE_HD int circle_steps(int block, int blocks) { return blocks % 2 == 0 && block >= blocks / 2 ? blocks / 2 : blocks / 2 + 1; }
FASTNCE_HD int circle_block(int block, int step, int blocks) { return block + step >= blocks ? block + step - blocks : block + step; }

// Whether the line j - i == diagonal crosses a tile of `rows` rows from i0 and `columns` columns from j0. In 64 bits, because 2^31 - 1
// stands for no diagonal.
FASTNCE_HD bool meets(int i0, int j0, int rows, int columns, int diagonal) {
  const int64_t local = static_cast<int64_t>(j0) - i0 - diagonal;
  return local < rows && local > -columns;
}

// ---------------------------------------------------------------- order of a walk: plain tiles first

// Tiles of a row block that need a mask, at most: three diagonals, each of which crosses up to five tiles of 128 rows and 32 columns, and a
// last tile that is ragged.
constexpr int MOST_MASKED = 16;
constexpr int NOWHERE = 2147483647;  // stands for a diagonal that does not exist: no pair of indices lies on it

// The order of the steps begin..begin + count of a walk: first, in ascending order, those whose pairs are all negative (plain ones), then
// the others. Kernels overlap products with exponentials over the plain ones, in a loop without a branch.
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

// For rows i0..i0 + rows and tiles of `width` columns. circle: steps count from column block `first` on, round the circle.
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
