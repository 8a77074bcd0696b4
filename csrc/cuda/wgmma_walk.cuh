// The walk of the wgmma kernels over their tiles: one warpgroup copies them, two compute, each 64 rows.
//
//     warp 0       copies x~ once and the tiles of y~, by TMA
//     warp 1       copies vectors of the columns
//     warps 2, 3   add sums of columns to memory (forward_both)
//     warps 4..11  products, exponentials, sums
//
// They hand over through barriers in shared memory: `full` when a place can be read, `empty` when it may be overwritten.
#pragma once

#include "hopper.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {

constexpr int WGMMA_THREADS = 384, CONSUMER_WARPS = 8, PRODUCER_WARPS = 4;
// Registers of a thread: 128 threads that copy and 256 that compute share 65,536.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

template <Kernel KERNEL, int DEPTH_, bool CONTENT_>
struct Walk {
  static constexpr int DEPTH = DEPTH_, BM = WGMMA_ROWS, BN = wgmma_columns(KERNEL, CONTENT_, DEPTH), NB = BN / 8;
  static constexpr bool CONTENT = CONTENT_;
  static constexpr int STAGES = wgmma_stages(KERNEL, DEPTH), VECTOR_STAGES = 4;
  static constexpr int FIELDS = KERNEL == Kernel::BACKWARD_ROWS ? BACKWARD_FIELDS<CONTENT> : FORWARD_FIELDS<CONTENT>;
  // Stages of the sums of columns. With ids there are more sums, and nothing overlaps: a second stage would gain nothing.
  static constexpr int SUM_STAGES = KERNEL == Kernel::FORWARD_BOTH && !CONTENT ? 2 : 1;
  static constexpr int SUMS = KERNEL == Kernel::FORWARD_BOTH ? (CONTENT ? 4 : 1) * CONSUMER_WARPS * BN : 0;  // floats of a stage
  static constexpr int X_BYTES = BM * DEPTH * 2, Y_BYTES = BN * DEPTH * 2;
  static constexpr int VECTORS_AT = X_BYTES + STAGES * Y_BYTES, SUMS_AT = VECTORS_AT + VECTOR_STAGES * FIELDS * BN * 4;
  static constexpr int BARRIERS_AT = SUMS_AT + SUM_STAGES * SUMS * 4;
  static constexpr int BARRIERS = 1 + 2 * (STAGES + VECTOR_STAGES + SUM_STAGES);
  static constexpr int ORDER_AT = BARRIERS_AT + BARRIERS * 8;
  static constexpr int BYTES = ORDER_AT + static_cast<int>(sizeof(Order));
  static_assert(BYTES + ATOM_BYTES <= 227 << 10);

  char* base;

  FASTNCE_DEVICE char* x() const { return base; }
  FASTNCE_DEVICE char* y(int n) const { return base + X_BYTES + n % STAGES * Y_BYTES; }
  FASTNCE_DEVICE Columns<BN> columns(int n) const {
    return {reinterpret_cast<float*>(base + VECTORS_AT) + n % VECTOR_STAGES * FIELDS * BN};
  }
  FASTNCE_DEVICE float& sum(int n, int which, int warp, int column) const {
    return reinterpret_cast<float*>(base + SUMS_AT)[n % SUM_STAGES * SUMS + (which * CONSUMER_WARPS + warp) * BN + column];
  }
  FASTNCE_DEVICE Order& order() const { return *reinterpret_cast<Order*>(base + ORDER_AT); }

  // The barriers of COUNT places that are filled and emptied in turn.
  template <int COUNT>
  struct Ring {
    uint64_t* at;  // COUNT times full, then COUNT times empty

    FASTNCE_DEVICE void init(int fillers, int emptiers) const {
      for (int i = 0; i < COUNT; ++i) {
        barrier_init(at + i, fillers);
        barrier_init(at + COUNT + i, emptiers);
      }
    }
    FASTNCE_DEVICE uint64_t* full(int n) const { return at + n % COUNT; }
    FASTNCE_DEVICE void wait_full(int n) const { barrier_wait(full(n), n / COUNT & 1); }
    // In the first turn every place is empty, and this does not wait.
    FASTNCE_DEVICE void wait_empty(int n) const { barrier_wait(at + COUNT + n % COUNT, (n / COUNT & 1) ^ 1); }
    // One lane says for its warp that no lane still needs the place.
    FASTNCE_DEVICE void release(int n) const {
      sync_warp();
      if (thread_index() % 32 == 0) barrier_arrive(at + COUNT + n % COUNT);
    }
    FASTNCE_DEVICE void fill(int n) const {
      sync_warp();
      if (thread_index() % 32 == 0) barrier_arrive(full(n));
    }
  };
  FASTNCE_DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(base + BARRIERS_AT); }
  FASTNCE_DEVICE uint64_t* x_full() const { return barriers(); }
  FASTNCE_DEVICE Ring<STAGES> tiles() const { return {barriers() + 1}; }
  FASTNCE_DEVICE Ring<VECTOR_STAGES> vectors() const { return {barriers() + 1 + 2 * STAGES}; }
  FASTNCE_DEVICE Ring<SUM_STAGES> sums() const { return {barriers() + 1 + 2 * (STAGES + VECTOR_STAGES)}; }

  // Sets the order of the steps and the barriers. All threads come here, before anything else.
  FASTNCE_DEVICE void start(const Rules& r, Range steps, bool all_masked, int i0, bool circle, int first) const {
    if (thread_index() == 0) {
      set_order(order(), steps, all_masked, i0, BM, BN, r.columns, circle, first, r.own, r.up, r.down);
      barrier_init(x_full(), 1);
      tiles().init(1, CONSUMER_WARPS);
      vectors().init(1, CONSUMER_WARPS);
      sums().init(CONSUMER_WARPS, 2);
      barriers_ready();
    }
    sync_block();
  }

  // Warp 0 copies tiles. column_of(n) is the first column of the n-th tile.
  template <class ColumnOf>
  FASTNCE_DEVICE void bring_tiles(const TensorMap* x_map, const TensorMap* y_map, int i0, const ColumnOf& column_of) const {
    if (thread_index() != 0 || order().count == 0) return;
    barrier_expect(x_full(), X_BYTES);
    for (int group = 0; group < DEPTH / GROUP; ++group) tensor_load(x() + group * BM * GROUP_BYTES, x_map, x_full(), group * GROUP, i0);
    for (int n = 0; n < order().count; ++n) {
      tiles().wait_empty(n);
      barrier_expect(tiles().full(n), Y_BYTES);
      for (int group = 0; group < DEPTH / GROUP; ++group)
        tensor_load(y(n) + group * BN * GROUP_BYTES, y_map, tiles().full(n), group * GROUP, column_of(n));
    }
  }

  // Warp 1 copies vectors. one_exponential: with 2^-base inside of the factors.
  template <class ColumnOf>
  FASTNCE_DEVICE void bring_vectors(const Vectors<FIELDS>& from, bool one_exponential, const ColumnOf& column_of) const {
    for (int n = 0; n < order().count; ++n) {
      vectors().wait_empty(n);
      const Columns<BN> to = columns(n);
      for (int column = thread_index() % 32; column < BN; column += 32) {
        const int j = column_of(n) + column;
#pragma unroll
        for (int f = 0; f < FIELDS; ++f) {
          if (!from.of[f]) continue;
          float value = static_cast<const float*>(from.of[f])[j];
          if ((f == FACTOR || f == FACTOR_POS) && one_exponential) value *= exp2_fast(-static_cast<const float*>(from.of[f - 1])[j]);
          to.field(static_cast<Field>(f))[column] = value;
        }
      }
      vectors().fill(n);
    }
  }
};

// The first of the 16 rows of this warp, and of the 64 rows of its warpgroup, among the BM of its block.
FASTNCE_DEVICE int consumer_row(int warp) { return (warp - PRODUCER_WARPS) * 16; }
FASTNCE_DEVICE int warpgroup_row(int warp) { return (warp - PRODUCER_WARPS) / 4 * 64; }

}  // namespace fastnce::cuda
