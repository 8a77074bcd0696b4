// Instructions of sm_90a (PTX ISA 8.0): barriers in shared memory, copies by the tensor memory accelerator, products of warpgroups.
#pragma once

#include "launch.cuh"
#include "tile.cuh"

#ifndef FASTNCE_EMULATED

#include <cuda.h>

namespace fastnce::cuda {

using TensorMap = CUtensorMap;

FASTNCE_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
FASTNCE_DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTNCE_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and makes the barrier wait for this many bytes too.
FASTNCE_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
FASTNCE_DEVICE void barrier_wait(uint64_t* barrier, unsigned parity) {
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
FASTNCE_DEVICE void tensor_load(char* to, const TensorMap* map, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
template <int REGISTERS>
FASTNCE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FASTNCE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
FASTNCE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTNCE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FASTNCE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving a wait that comes later to before the computation of this value: an instruction that does nothing depends
// on it.
FASTNCE_DEVICE void wgmma_hold(float value) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.f32 p, %0, 0f7f800000;\n@p nanosleep.u32 0;\n}" ::"f"(value) : "memory");
}
// Keeps the compiler from moving a read of these sums that comes later to before this place.
template <int NB>
FASTNCE_DEVICE void settle(Strip<NB>& c) {
#pragma unroll
  for (int nb = 0; nb < NB; ++nb)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[nb][e])::"memory");
}

// A map of (rows, columns) float16 numbers, for copies of boxes of box_rows x 64 with the 128-byte swizzle.
TensorMap tensor_map(const uint16_t* base, int64_t rows, int columns, int box_rows);

}  // namespace fastnce::cuda

#include "wgmma.cuh"

#else

namespace fastnce::cuda {

using emulator::barrier_arrive;
using emulator::barrier_expect;
using emulator::barrier_init;
using emulator::barrier_wait;
using emulator::tensor_load;
using emulator::TensorMap;
using emulator::wgmma_commit;
using emulator::wgmma_fence;

inline void barriers_ready() {}
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}
template <int PENDING>
void wgmma_wait() {
  emulator::wgmma_wait(PENDING);
}
inline void wgmma_hold(float) {}
template <int NB>
void settle(Strip<NB>&) {}
template <int N>
void wgmma(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma(&c[0][0], N, nullptr, a, b, false, accumulate);
}
template <int N>
void wgmma_rows(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::wgmma(&c[0][0], N, a, 0, b, true, true);
}
inline TensorMap tensor_map(const uint16_t* base, int64_t rows, int columns, int box_rows) {
  return {base, rows, columns, columns, box_rows, GROUP};
}

}  // namespace fastnce::cuda

#endif

namespace fastnce::cuda {

// The maps of both operands, for copies of tiles. Without keys no tile is visited, and y is a copy of x: a map of no rows cannot be made.
struct OperandMaps {
  TensorMap x, y;

  OperandMaps(const Problem& p, int x_rows, int y_rows)
      : x(tensor_map(p.x, p.row_padded, p.depth, x_rows)), y(p.column_padded ? tensor_map(p.y, p.column_padded, p.depth, y_rows) : x) {}
};

// A matrix descriptor (PTX ISA, "Shared memory matrix layout"): the address and both strides in units of 16 bytes, and the 128-byte
// swizzle.
FASTNCE_DEVICE uint64_t descriptor(const void* at, int leading_bytes, int stride_bytes) {
  const uint64_t address = (shared_address(at) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>(leading_bytes >> 4) << 16 | static_cast<uint64_t>(stride_bytes >> 4) << 32 | uint64_t{1} << 62;
}

// c = x~ y~' of 64 rows from `x` on, in a tile of x_rows, and of the N rows of a tile y. An instruction multiplies 16 columns, 32 bytes of
// every row.
template <int N, int DEPTH>
FASTNCE_DEVICE void issue_logits(Strip<N / 8>& c, const char* x, int x_rows, const char* y) {
#pragma unroll
  for (int k = 0; k < DEPTH / 16; ++k) {
    const uint64_t a = descriptor(x + k / 4 * x_rows * GROUP_BYTES, 16, ATOM_BYTES),
                   b = descriptor(y + k / 4 * N * GROUP_BYTES, 16, ATOM_BYTES);
    wgmma<N>(c, a + k % 4 * 2, b + k % 4 * 2, k > 0);
  }
}

// dx += g y~ for the ROWS rows of a tile y. g is the left operand, in registers; an instruction takes 16 rows of y.
template <int DEPTH, int ROWS>
FASTNCE_DEVICE void issue_gradient(Strip<DEPTH / 8>& dx, const uint32_t (&g)[ROWS / 16][4], const char* y) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) wgmma_rows<DEPTH>(dx, g[k], descriptor(y + k * 16 * GROUP_BYTES, ROWS * GROUP_BYTES, ATOM_BYTES));
}

}  // namespace fastnce::cuda
