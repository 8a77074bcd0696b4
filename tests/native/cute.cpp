// cute.h by CuTe's headers, for a C++ compiler alone. Compiled with the version of CUDA's compiler, so that CuTe makes TMA descriptors, and
// with CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL, so that it calls the driver's function by its name.
#define __cvta_generic_to_shared(pointer) reinterpret_cast<uintptr_t>(pointer)
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include "cute.h"

// clang-format off
#include <cute/tensor.hpp>  // first: the others take it for granted
// clang-format on

#include <cstdio>
#include <cstdlib>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <map>
#include <utility>

namespace cute_says {
namespace {

using namespace cute;
using Half = half_t;
namespace gmma = SM90::GMMA;

[[noreturn]] void unknown(const char* what, int number) {
  std::printf("cute.cpp has no %s of %d\n", what, number);
  std::exit(2);
}

Half* nowhere() { return nullptr; }

// The layout of ROWS x DEPTH numbers; turned: of DEPTH x ROWS.
template <int ROWS, int DEPTH>
auto along() {
  return tile_to_shape(gmma::Layout_K_SW128_Atom<Half>{}, make_shape(Int<ROWS>{}, Int<DEPTH>{}));
}
template <int ROWS, int DEPTH>
auto down() {
  return tile_to_shape(gmma::Layout_MN_SW128_Atom<Half>{}, make_shape(Int<DEPTH>{}, Int<ROWS>{}), Step<_2, _1>{});
}

// The descriptors of all blocks of MN x 16 numbers of a layout, in the order of CuTe's own iterator.
template <gmma::Major MAJOR, int MN, class Of>
auto descriptors(const Of& layout) {
  const auto blocks = zipped_divide(make_tensor(make_smem_ptr(nowhere()), layout), make_shape(Int<MN>{}, _16{}));
  return make_tensor<gmma::smem_desc<MAJOR>>(blocks);
}

template <int ROWS, int DEPTH>
Tile make() {
  Tile found{ROWS, DEPTH, {}, {}, {}, {}, {}};
  const auto k = as_position_independent_swizzle_layout(along<ROWS, DEPTH>()),
             mn = as_position_independent_swizzle_layout(down<ROWS, DEPTH>());
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < DEPTH; ++column) {
      found.along.push_back(static_cast<int>(k(row, column) * sizeof(Half)));
      found.down.push_back(static_cast<int>(mn(column, row) * sizeof(Half)));
    }
  if constexpr (ROWS % 64 == 0) {
    const auto of = descriptors<gmma::Major::K, 64>(along<ROWS, DEPTH>());
    for (int m = 0; m < ROWS / 64; ++m) {
      found.left.emplace_back();
      for (int step = 0; step < DEPTH / 16; ++step) found.left.back().push_back(of(0, make_coord(m, step)).desc_);
    }
  }
  const auto right = descriptors<gmma::Major::K, ROWS>(along<ROWS, DEPTH>());
  for (int step = 0; step < DEPTH / 16; ++step) found.right.push_back(right(0, make_coord(0, step)).desc_);
  const auto turned = descriptors<gmma::Major::MN, DEPTH>(down<ROWS, DEPTH>());
  for (int step = 0; step < ROWS / 16; ++step) found.turned.push_back(turned(0, make_coord(0, step)).desc_);
  return found;
}

// CuTe numbers the elements of an operand column by column.
Place in_columns_of(int rows, int index) { return {index % rows, index / rows}; }

template <int N>
int sum_index(int thread, int v) {
  return gmma::CLayout_64xN<N>{}(thread, v);
}

using Warpgroup = MMA_Traits<SM90_64x64x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>>;
using Warp = MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>;

template <int BOX_ROWS>
void make_map(const Half* base, int64_t rows, int columns) {
  const auto tensor = make_tensor(make_gmem_ptr(base), make_layout(make_shape(rows, columns), make_stride(int64_t{columns}, _1{})));
  const auto box = make_shape(Int<BOX_ROWS>{}, _64{});
  make_tma_copy(SM90_TMA_LOAD{}, tensor, tile_to_shape(gmma::Layout_K_SW128_Atom<Half>{}, box), box, _1{});
}

}  // namespace

const Tile& tile(int rows, int depth) {
  static const std::map<std::pair<int, int>, Tile> all = [] {
    std::map<std::pair<int, int>, Tile> found;
    const auto add = [&](Tile one) { found.emplace(std::pair(one.rows, one.depth), std::move(one)); };
    add(make<16, 64>()), add(make<16, 128>()), add(make<16, 256>());
    add(make<32, 64>()), add(make<32, 128>()), add(make<32, 256>());
    add(make<64, 64>()), add(make<64, 128>()), add(make<64, 256>());
    add(make<128, 64>()), add(make<128, 128>()), add(make<128, 256>());
    return found;
  }();
  const auto found = all.find({rows, depth});
  if (found == all.end()) unknown("tile", rows * 1000 + depth);
  return found->second;
}

Place wgmma_sum(int n, int thread, int v) {
  switch (n) {
    case 32:
      return in_columns_of(64, sum_index<32>(thread, v));
    case 64:
      return in_columns_of(64, sum_index<64>(thread, v));
    case 128:
      return in_columns_of(64, sum_index<128>(thread, v));
    case 256:
      return in_columns_of(64, sum_index<256>(thread, v));
  }
  unknown("sums", n);
}
Place wgmma_left(int thread, int v) { return in_columns_of(64, Warpgroup::ALayout{}(thread, v)); }

Place mma_left(int lane, int v) { return in_columns_of(16, Warp::ALayout{}(lane, v)); }
Place mma_right(int lane, int v) { return in_columns_of(8, Warp::BLayout{}(lane, v)); }
Place mma_sum(int lane, int v) { return in_columns_of(16, Warp::CLayout{}(lane, v)); }

Place ldmatrix(bool transposed, int lane, int v) {
  const int bit =
      transposed ? Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout{}(lane, 16 * v) : Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout{}(lane, 16 * v);
  return {bit / 128, bit % 128 / 16};
}

void make_tensor_map(const uint16_t* base, int64_t rows, int columns, int box_rows) {
  const auto* halves = reinterpret_cast<const Half*>(base);
  switch (box_rows) {
    case 32:
      return make_map<32>(halves, rows, columns);
    case 64:
      return make_map<64>(halves, rows, columns);
    case 128:
      return make_map<128>(halves, rows, columns);
  }
  unknown("box", box_rows);
}

}  // namespace cute_says
