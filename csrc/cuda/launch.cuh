// The launch of a kernel, on a GPU or emulated.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "launch.h"

namespace fastnce::cuda {

// The shared memory that every kernel may use. More of it must be asked for.
constexpr size_t PLAIN_SHARED = 48 << 10;

#ifdef FASTNCE_EMULATED

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream, const Arguments&... arguments) {
  emulator::run(static_cast<int>(blocks), threads, shared_bytes, [&] { kernel(arguments...); });
}

#else

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("fastnce: ") + what + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 2147483647) throw std::runtime_error("fastnce: more than 2^31 - 1 programs in one launch");
  shared_bytes += shared_bytes ? ATOM_BYTES : 0;  // shared_memory() aligns
  if (shared_bytes > PLAIN_SHARED)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), "shared memory");
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  check(cudaGetLastError(), "launch");
}

#endif

// The programs of a walk: blocks of `rows` rows, times splits.
inline int64_t programs(const Problem& p, const Grid& grid, int rows) {
  return static_cast<int64_t>(ceil_div(p.rules.rows, rows)) * grid.splits;
}

}  // namespace fastnce::cuda
