// csrc/cuda/device.cuh for a CPU: every thread of a block is a fiber, and each instruction does what the PTX ISA says it means.
//
// What a GPU does at its leisure is done as late as it may be, and what must not be looked at until then holds nan: a copy that is under
// way has already spoiled its target and arrives at the wait for it; a wgmma has spoiled its accumulators and runs at the wait for it, on
// operands that must not have changed since. Fibers run in an order that changes with the seed. Threads that disagree about a collective,
// or all wait for each other, end the program with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define FASTNCE_DEVICE inline
#define FASTNCE_KERNEL(threads, blocks) inline void

// Restriction in name only: one value for all.
#define __grid_constant__
#define __restrict__

namespace emulator {

// Run a kernel: every block in turn, its threads as fibers.
void run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);
void seed(uint64_t value);

int thread_index();
int block_index();
int block_count();
char* shared_memory();
uint32_t shared_address(const void* p);
[[noreturn]] void fail(const char* what);

void sync_block();

// All `lanes` threads of a group (32: a warp, 128: a warpgroup) meet; each brings `size` bytes. The last one calls work(inputs of all), and
// then all go on with a copy of everything.
constexpr int MOST = 128;
struct Slots {
  char bytes[MOST][64];
};
const Slots& meet(int lanes, const char* what, const void* mine, size_t size);

struct TensorMap {
  const uint16_t* base;
  int64_t rows, columns, pitch;
  int box_rows, box_columns;
};

void copy_async(char* shared, const void* global);
void copy_commit();
void copy_wait(int pending);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, unsigned parity);
void tensor_load(char* shared, const TensorMap* map, uint64_t* barrier, int column, int row);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// a: null, or 4 registers of this thread; then descriptor_a is not used.
void wgmma(float* c, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b, bool b_by_rows, bool accumulate);

float half_to_float(uint16_t x);
uint16_t float_to_half(float x);
// Sums of products as tensor cores round them: towards zero.
float add_products(float c, const float* a, const float* b, int count, int stride_b);

}  // namespace emulator

namespace fastnce::cuda {

FASTNCE_DEVICE int thread_index() { return emulator::thread_index(); }
FASTNCE_DEVICE int block_index() { return emulator::block_index(); }
FASTNCE_DEVICE int block_count() { return emulator::block_count(); }
FASTNCE_DEVICE void sync_block() { emulator::sync_block(); }
FASTNCE_DEVICE char* shared_memory() { return emulator::shared_memory(); }
FASTNCE_DEVICE uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

FASTNCE_DEVICE float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
FASTNCE_DEVICE float larger(float a, float b) { return std::fmax(a, b); }
FASTNCE_DEVICE uint16_t to_half(float x) { return emulator::float_to_half(x); }
FASTNCE_DEVICE float from_half(uint16_t x) { return emulator::half_to_float(x); }
FASTNCE_DEVICE uint32_t to_half2(float low, float high) { return to_half(low) | static_cast<uint32_t>(to_half(high)) << 16; }

template <class T>
FASTNCE_DEVICE T emulated_slot(const emulator::Slots& slots, int lane) {
  T value;
  std::memcpy(&value, slots.bytes[lane], sizeof(T));
  return value;
}

template <class T>
FASTNCE_DEVICE T shuffle_xor(T value, int mask) {
  return emulated_slot<T>(emulator::meet(32, "shuffle_xor", &value, sizeof value), (thread_index() % 32) ^ mask);
}
FASTNCE_DEVICE bool any_lane(bool value) {
  const emulator::Slots& all = emulator::meet(32, "any_lane", &value, sizeof value);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any |= emulated_slot<bool>(all, lane);
  return any;
}

FASTNCE_DEVICE void sync_warp() {
  const int nothing = 0;
  emulator::meet(32, "sync_warp", &nothing, sizeof nothing);
}
FASTNCE_DEVICE int population(uint32_t bits) { return __builtin_popcount(bits); }

// Register r of lane l: two neighbours of row l / 4 of matrix r, or, transposed, of its column l / 4.
FASTNCE_DEVICE void emulated_ldmatrix(uint32_t (&r)[4], const char* row, bool transposed) {
  if (emulator::shared_address(row) % 16) emulator::fail("ldmatrix: a row that is not aligned to 16 bytes");
  const emulator::Slots& all = emulator::meet(32, transposed ? "ldmatrix.trans" : "ldmatrix", &row, sizeof row);
  const int lane = thread_index() % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t two[2];
    for (int e = 0; e < 2; ++e) {
      const int along = lane % 4 * 2 + e, across = lane / 4;
      const char* from = emulated_slot<const char*>(all, matrix * 8 + (transposed ? along : across));
      std::memcpy(&two[e], from + 2 * (transposed ? across : along), 2);
    }
    r[matrix] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
}
FASTNCE_DEVICE void ldmatrix(uint32_t (&r)[4], const char* row) { emulated_ldmatrix(r, row, false); }
FASTNCE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const char* row) { emulated_ldmatrix(r, row, true); }

FASTNCE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulator::Slots& all = emulator::meet(32, "mma", mine, sizeof mine);
  const int lane = thread_index() % 32, group = lane / 4, in_group = lane % 4;
  const auto half = [&](int of, int reg, int which) {
    uint16_t bits;
    std::memcpy(&bits, all.bytes[of] + 4 * reg + 2 * which, 2);
    return emulator::half_to_float(bits);
  };
  for (int e = 0; e < 4; ++e) {
    float left[16], right[16];
    const int column = in_group * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      // PTX ISA, mma.m16n8k16: a0, a1 are (g, 2t..), a2, a3 (g + 8, 2t..), a4.. the same 8 further in k; b0, b1 are (2t.., g), b2, b3 8
      // further.
      left[k] = half(group * 4 + k % 8 / 2, e / 2 + k / 8 * 2, k % 2);
      right[k] = half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    c[e] = emulator::add_products(c[e], left, right, 16, 1);
  }
}

FASTNCE_DEVICE void copy_async(char* shared, const void* global) { emulator::copy_async(shared, global); }
FASTNCE_DEVICE void copy_commit() { emulator::copy_commit(); }
template <int PENDING>
FASTNCE_DEVICE void copy_wait() {
  emulator::copy_wait(PENDING);
}
// Fibers share one thread of the CPU.
template <class T>
FASTNCE_DEVICE void atomic_add(T* to, T value) {
  *to += value;
}

}  // namespace fastnce::cuda
