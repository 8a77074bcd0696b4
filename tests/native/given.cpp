#include <cuda.h>
#include <cuda_runtime_api.h>
#undef __grid_constant__  // emulator.h has its own

#include <cstdio>
#include <cstdlib>
#include <string>

#include "given.h"

namespace recorder {

int thread = 0;
alignas(1024) char shared[256 << 10];
Given given;
std::vector<Encoded> encoded;

}  // namespace recorder

using namespace recorder;

// In the place of the driver and of CUDA's runtime. How much L2 fetches at once is a hint, and not looked at.
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                                        const cuuint64_t* pitches, const cuuint32_t* box, const cuuint32_t* step,
                                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                        CUtensorMapFloatOOBfill fill) {
  if (rank != 2) emulator::fail("cuTensorMapEncodeTiled: not of two dimensions");
  encoded.push_back({type,
                     base,
                     {sizes[0], sizes[1]},
                     pitches[0],
                     {box[0], box[1]},
                     {step[0], step[1]},
                     interleave,
                     swizzle,
                     fill,
                     reinterpret_cast<uintptr_t>(map) % 64 == 0});
  return CUDA_SUCCESS;
}
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long,
                                                       cudaDriverEntryPointQueryResult* status) {
  if (std::string(name) != "cuTensorMapEncodeTiled" || version != 12000) emulator::fail("another function of the driver");
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emulator {

int thread_index() { return thread; }
uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - shared); }
[[noreturn]] void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

// Register j of the n-th ldmatrix holds the number 4 n + j.
void ldmatrix(uint32_t (&r)[4], const char* row, bool transposed) {
  for (uint32_t j = 0; j < 4; ++j) r[j] = static_cast<uint32_t>(4 * given.rows.size()) + j;
  given.rows.push_back(static_cast<int>(shared_address(row)));
  given.transposed.push_back(transposed);
}
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  given.warp_products.push_back({c, {a[0], a[1], a[2], a[3]}, {b0, b1}});
}
void wgmma(float* c, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b, bool b_by_rows, bool accumulate) {
  given.products.push_back({c, n, a, descriptor_a, descriptor_b, b_by_rows, accumulate});
}
void tensor_load(char* to, const TensorMap* map, uint64_t*, int column, int row) {
  given.boxes.push_back({static_cast<int>(shared_address(to)), map, column, row});
}
void copy_async(char* to, const void* from) {
  given.copies.push_back({static_cast<int>(shared_address(to)), static_cast<const uint16_t*>(from)});
}

void sync_block() {}
void barrier_init(uint64_t*, int) {}
void barrier_expect(uint64_t*, int) {}
void barrier_wait(uint64_t*, unsigned) {}

uint16_t float_to_half(float x) {
  const auto value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

}  // namespace emulator
