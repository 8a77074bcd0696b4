// The tile and the launch of every kernel over tiles, for bind.cpp: host code without torch. Each function is in the unit of its kernel.
#pragma once

#include <cstddef>

#include "problem.h"

namespace fastnce::cuda {

using Stream = void*;  // cudaStream_t

enum class Kernel { FORWARD_ROWS, FORWARD_BOTH, RETRIEVAL, BACKWARD_ROWS, WEIGHTS_BLOCK };
enum Family { MMA = 0, WGMMA = 1 };

// Rows and columns of the tile that a kernel takes, and its family.
struct TileShape {
  int rows, columns, family;
};

// depth: of the operand, 0 where rows do not fit into shared memory. by_content: pairs are told apart by labels, exclude ids or a mask.
TileShape tile_of(Kernel kernel, bool by_content, int parts, int depth, int architecture);

// All throw std::runtime_error with CUDA's message where a launch fails.
void forward_rows(const Problem&, const Grid&, const RowSums&, int family, Stream);
void forward_both(const Problem&, const Grid&, const BothSums&, int family, Stream);
void retrieval(const Problem&, const Grid&, const Retrieval&, Stream);
void backward_rows(const Problem&, const Grid&, const Weights&, const RowGradient&, int family, Stream);
void weights_block(const Problem&, const Weights&, const Block&, Stream);

}  // namespace fastnce::cuda
