// The problems that the wgmma kernels of sm_90a serve, and their tiles.
#pragma once

#include <stdexcept>

#include "launch.h"

namespace fastnce::cuda {

constexpr int WGMMA_ROWS = 128;  // two warpgroups of 64

constexpr bool wgmma_serves(Kernel kernel, int parts, int depth) {
#ifndef FASTNCE_SM90
  return false;
#endif
  const bool has_kernel = kernel == Kernel::FORWARD_ROWS || kernel == Kernel::FORWARD_BOTH || kernel == Kernel::BACKWARD_ROWS;
  return has_kernel && parts == 1 && (depth == 64 || depth == 128 || depth == 256);
}

// Columns of a tile. A gradient holds D sums for each row beside the tile, and ids take registers too.
constexpr int wgmma_columns(Kernel kernel, bool content, int depth) {
  return kernel != Kernel::BACKWARD_ROWS ? 128 : content || depth == 256 ? 32 : 64;
}

// Tiles between the copies and the products: copied, or under way.
constexpr int wgmma_stages(Kernel kernel, int depth) { return depth == 256 ? (kernel == Kernel::BACKWARD_ROWS ? 3 : 2) : 3; }

#ifdef FASTNCE_SM90  // sm_90a is among the architectures of this build
void wgmma_forward_rows(const Problem&, const Grid&, const RowSums&, Stream);
void wgmma_forward_both(const Problem&, const Grid&, const BothSums&, Stream);
void wgmma_backward_rows(const Problem&, const Grid&, const Weights&, const RowGradient&, Stream);
#else
[[noreturn]] inline void no_wgmma() { throw std::runtime_error("fastnce: this library was built without sm_90a"); }
[[noreturn]] inline void wgmma_forward_rows(const Problem&, const Grid&, const RowSums&, Stream) { no_wgmma(); }
[[noreturn]] inline void wgmma_forward_both(const Problem&, const Grid&, const BothSums&, Stream) { no_wgmma(); }
[[noreturn]] inline void wgmma_backward_rows(const Problem&, const Grid&, const Weights&, const RowGradient&, Stream) { no_wgmma(); }
#endif

}  // namespace fastnce::cuda
