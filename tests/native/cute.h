// The word of CuTe, CUTLASS's library of layouts, on what csrc/cuda takes from the hardware: as plain functions, so that only cute.cpp
// compiles its headers. They are NVIDIA's own, and share no line with csrc/cuda or the emulator.
#pragma once

#include <cstdint>
#include <vector>

namespace cute_says {

struct Place {
  int row, column;
  bool operator==(const Place& other) const { return row == other.row && column == other.column; }
};

// A tile of float16 numbers in shared memory, with the 128-byte swizzle, at address 0.
struct Tile {
  int rows, depth;
  std::vector<int> along;  // byte of (row, column), at row * depth + column, of the layout with k along the rows ("K-major")
  std::vector<int> down;   // the same where k goes down the rows ("MN-major")
  // Descriptors of the operands of wgmma.
  std::vector<std::vector<uint64_t>> left;  // [rows / 64][depth / 16]: 64 rows, 16 columns; none where there are fewer rows
  std::vector<uint64_t> right;              // [depth / 16]: all rows, 16 columns
  std::vector<uint64_t> turned;             // [rows / 16]: all columns, 16 rows, k down the rows
};
// Every size that the kernels use.
const Tile& tile(int rows, int depth);

// wgmma: the element of the 64 x n sums, and of the 64 x 16 left operand in registers, that is value v of a thread.
Place wgmma_sum(int n, int thread, int v);
Place wgmma_left(int thread, int v);
// mma.m16n8k16: (row, k) of A, (column, k) of B, (row, column) of C.
Place mma_left(int lane, int v);
Place mma_right(int lane, int v);
Place mma_sum(int lane, int v);
// ldmatrix.x4: where float16 number v of a lane comes from. row: of the 16-byte rows, by the lane that points to it; column: in that row.
Place ldmatrix(bool transposed, int lane, int v);

// Makes a TMA descriptor of (rows, columns) float16 numbers for boxes of box_rows x 64: calls cuTensorMapEncodeTiled.
void make_tensor_map(const uint16_t* base, int64_t rows, int columns, int box_rows);

}  // namespace cute_says
