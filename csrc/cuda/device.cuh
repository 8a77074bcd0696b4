// The instructions of the GPU, one function each. With FASTNCE_EMULATED, tests/native/emulator.h has the same functions for a CPU: the
// kernels are the same source for both.
#pragma once

#include "index.h"

#ifdef FASTNCE_EMULATED
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTNCE_DEVICE __device__ __forceinline__
#define FASTNCE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fastnce::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

FASTNCE_DEVICE int thread_index() { return threadIdx.x; }
FASTNCE_DEVICE int block_index() { return blockIdx.x; }
FASTNCE_DEVICE int block_count() { return gridDim.x; }
FASTNCE_DEVICE void sync_block() { __syncthreads(); }

// Dynamic shared memory, aligned for the swizzle: launch() asks for ATOM_BYTES more than the kernel needs.
FASTNCE_DEVICE char* shared_memory() {
  extern __shared__ char fastnce_shared[];
  return fastnce_shared + (ATOM_BYTES - static_cast<unsigned>(__cvta_generic_to_shared(fastnce_shared)) % ATOM_BYTES) % ATOM_BYTES;
}
FASTNCE_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---------------------------------------------------------------- numbers

// 2^x with a relative error of 2^-22; 0 where it is below 2^-126, nan for nan.
FASTNCE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// nan only where both a and b are.
FASTNCE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FASTNCE_DEVICE uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
FASTNCE_DEVICE float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
FASTNCE_DEVICE uint32_t to_half2(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// ---------------------------------------------------------------- warps

template <class T>
FASTNCE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(ALL_LANES, value, mask);
}
FASTNCE_DEVICE bool any_lane(bool value) { return __any_sync(ALL_LANES, value); }
FASTNCE_DEVICE void sync_warp() { __syncwarp(); }
FASTNCE_DEVICE int population(uint32_t bits) { return __popc(bits); }

FASTNCE_DEVICE void ldmatrix(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FASTNCE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// c (16 x 8) += a (16 x 16) b (16 x 8): float16 numbers, float32 sums.
FASTNCE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- memory

FASTNCE_DEVICE void copy_async(char* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
FASTNCE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FASTNCE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
template <class T>
FASTNCE_DEVICE void atomic_add(T* to, T value) {
  atomicAdd(to, value);
}

}  // namespace fastnce::cuda

#endif
