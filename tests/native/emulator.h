// The functions of csrc/cuda/device.cuh and hopper.cuh for a CPU. Every thread of a block is a fiber, and each instruction does what the
// PTX ISA says that it means.
//
// Results that a kernel must wait for arrive as late as they may, and hold nan until then. A copy spoils its target at once, and is made at
// the wait for it. A wgmma spoils its accumulators at once, and is computed at the wait for it, from operands that must not have changed.
//
// The order of the fibers depends on the seed: all take turns, or one warp goes ahead of the others as far as it may; a wait ends at once,
// or when no other thread can go on. Threads that disagree about a collective, or all wait for each other, end the program with a message.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define FASTNCE_DEVICE inline
#define FASTNCE_KERNEL(threads, blocks) inline void

// Qualifiers that mean nothing here.
#define __grid_constant__
#define __restrict__

namespace emulator {

// Runs a kernel: one block after the other, the threads of a block as fibers.
void run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);
void seed(uint64_t value);

int thread_index();
int block_index();
int block_count();
char* shared_memory();
uint32_t shared_address(const void* p);
[[noreturn]] void fail(const char* what);

void sync_block();

// All `lanes` threads of a group (32: a warp, 128: a warpgroup) meet. Each brings `size` bytes, and when the last has come, all go on with
// the bytes of all.
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

void ldmatrix(uint32_t (&r)[4], const char* row, bool transposed);
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

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
// a: 4 registers of this thread, or null where the left operand is in shared memory at descriptor_a.
void wgmma(float* c, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b, bool b_by_rows, bool accumulate);

float half_to_float(uint16_t x);
uint16_t float_to_half(float x);
// Sums of products as tensor cores round them: towards zero.
float add_products(float c, const float* a, const float* b, int count);

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

FASTNCE_DEVICE void ldmatrix(uint32_t (&r)[4], const char* row) { emulator::ldmatrix(r, row, false); }
FASTNCE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const char* row) { emulator::ldmatrix(r, row, true); }
using emulator::mma;

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
