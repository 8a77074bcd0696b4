// A program that compares csrc/cuda with CuTe (cute.h): where every number of a tile lies, every descriptor and how it advances, the
// elements that a thread holds, the rows that ldmatrix reads, the boxes and the map of TMA.
//
// The functions under test are those of the kernels, over the instructions of given.h. Every wrong value is a line, and makes the exit
// status 1.
#include <cuda.h>
#include <cuda_runtime_api.h>
#undef __grid_constant__  // emulator.h has its own

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backward_wgmma.cuh"
#include "cute.h"
#include "forms.cuh"
#include "forward_wgmma.cuh"
#include "given.h"

// tensor_map as a GPU's compiler sees it: its unit once more, without the launches, and with CUDA's own type of a map.
namespace fastnce::cuda {
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) emulator::fail(what);
}
}  // namespace fastnce::cuda
#undef FASTNCE_EMULATED
#define TensorMap CUtensorMap
#define tensor_map encoded_map
#define launch(...)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include "forward_sm90.cu"
#pragma GCC diagnostic pop
#undef launch
#undef tensor_map
#undef TensorMap

using namespace fastnce::cuda;
using namespace recorder;
using cute_says::Place;
using cute_says::Tile;

namespace {

int64_t checks = 0, wrong = 0;

// At most this many lines are printed.
constexpr int64_t MOST_LINES = 40;

template <class... Where>
void is(bool holds, const char* what, const Where&... where) {
  ++checks;
  if (holds || ++wrong > MOST_LINES) return;
  std::string at;
  ((at += " " + std::to_string(where)), ...);
  std::printf("%s:%s\n", what, at.c_str());
}

float from_bits(uint32_t bits) {
  _Float16 value;
  const auto low = static_cast<uint16_t>(bits);
  std::memcpy(&value, &low, 2);
  return static_cast<float>(value);
}

// ---------------------------------------------------------------- tiles in shared memory

void tiles() {
  for (int rows : {16, 32, 64, 128})
    for (int depth : {64, 128, 256}) {
      const Tile& tile = cute_says::tile(rows, depth);
      for (int row = 0; row < rows; ++row)
        for (int column = 0; column < depth; ++column) {
          const int byte = unit_byte(row, column / UNIT, rows) + column % UNIT * 2;
          is(byte == tile.along[row * depth + column], "unit_byte, k along the rows", rows, depth, row, column, byte);
          is(byte == tile.down[row * depth + column], "unit_byte, k down the rows", rows, depth, row, column, byte);
        }
    }
}

// ---------------------------------------------------------------- wgmma

// A descriptor of CuTe for a tile that begins at `byte`.
uint64_t moved(uint64_t descriptor, int byte) { return descriptor + (static_cast<uint64_t>(byte) >> 4); }

// Bits 16..29, the leading offset: without a meaning where no second group of 64 columns follows.
uint64_t without_leading(uint64_t descriptor) { return descriptor & ~(uint64_t{0x3fff} << 16); }

template <class W>
void logits(const W& walk) {
  constexpr int DEPTH = W::DEPTH;
  const Tile &x = cute_says::tile(W::BM, DEPTH), &y = cute_says::tile(W::BN, DEPTH);
  for (int stage = 0; stage < W::STAGES; ++stage)
    for (int warp = PRODUCER_WARPS; warp < PRODUCER_WARPS + CONSUMER_WARPS; ++warp) {
      given = {};
      Strip<W::NB> c;
      issue_logits<W::BN, DEPTH>(c, walk.x() + warpgroup_row(warp) * GROUP_BYTES, W::BM, walk.y(stage));
      is(given.products.size() == DEPTH / 16, "issue_logits: the number of its products", W::BN, DEPTH, given.products.size());
      for (size_t k = 0; k < given.products.size(); ++k) {
        const Product& one = given.products[k];
        is(one.c == &c[0][0] && one.n == W::BN && !one.a && !one.by_rows && one.accumulate == (k > 0), "issue_logits", W::BN, DEPTH, k);
        const uint64_t a = moved(x.left[warpgroup_row(warp) / 64][k], emulator::shared_address(walk.x())),
                       b = moved(y.right[k], emulator::shared_address(walk.y(stage)));
        is(one.descriptor_a == a, "descriptor of x~", W::BM, DEPTH, warp, k, one.descriptor_a, a);
        is(one.descriptor_b == b, "descriptor of y~", W::BN, DEPTH, stage, k, one.descriptor_b, b);
      }
    }
}

template <class W>
void gradients(const W& walk) {
  constexpr int DEPTH = W::DEPTH, ROWS = W::BN;
  const Tile& y = cute_says::tile(ROWS, DEPTH);
  for (int stage = 0; stage < W::STAGES; ++stage) {
    given = {};
    Strip<DEPTH / 8> dx;
    const uint32_t g[ROWS / 16][4] = {};
    issue_gradient<DEPTH, ROWS>(dx, g, walk.y(stage));
    is(given.products.size() == ROWS / 16, "issue_gradient: the number of its products", ROWS, DEPTH, given.products.size());
    for (size_t k = 0; k < given.products.size(); ++k) {
      const Product& one = given.products[k];
      is(one.c == &dx[0][0] && one.n == DEPTH && one.a == g[k] && one.by_rows && one.accumulate, "issue_gradient", ROWS, DEPTH, k);
      const uint64_t b = moved(y.turned[k], emulator::shared_address(walk.y(stage)));
      const bool same = DEPTH == GROUP ? without_leading(one.descriptor_b) == without_leading(b) : one.descriptor_b == b;
      is(same, "descriptor of y~, k down the rows", ROWS, DEPTH, stage, k, one.descriptor_b, b);
    }
  }
}

// The left operand in registers: weights as the sums lie, times a vector of the columns. Rows and columns, one after the other, are numbers
// that float16 holds exactly.
template <class W>
void left_operands() {
  float beta[W::BN];
  for (int by_row = 0; by_row < 2; ++by_row)
    for (thread = 0; thread < 128; ++thread) {
      for (int column = 0; column < W::BN; ++column) beta[column] = by_row ? 1.0f : static_cast<float>(column);
      Strip<W::NB> weights;
      for (int v = 0; v < W::BN / 2; ++v)
        weights[v / 4][v % 4] = by_row ? static_cast<float>(cute_says::wgmma_sum(W::BN, thread, v).row) : 1.0f;
      uint32_t g[W::BN / 16][4];
      to_operand<W>(g, weights, Columns<W::BN>{beta});
      for (int v = 0; v < W::BN / 2; ++v) {
        const Place at = cute_says::wgmma_left(thread, v % 8);
        const float found = from_bits(g[v / 8][v % 8 / 2] >> v % 2 * 16);
        is(found == (by_row ? at.row : v / 8 * 16 + at.column), "to_operand", by_row, W::BN, thread, v);
      }
    }
  thread = 0;
}

void wgmma_sums() {
  for (int n : {32, 64, 128, 256})
    for (int t = 0; t < 128; ++t)
      for (int v = 0; v < n / 2; ++v) {
        const int warp = PRODUCER_WARPS + t / 32, row = consumer_row(warp) - warpgroup_row(warp) + fragment_row(t % 32, v % 4);
        is(cute_says::wgmma_sum(n, t, v) == Place{row, v / 4 * 8 + fragment_column(t % 32, v % 4)}, "sums of wgmma", n, t, v);
      }
}

// ---------------------------------------------------------------- TMA

// TMA's limits, those that CUTLASS asserts before it makes a map and those of the swizzle.
void within_limits(const Encoded& map) {
  const auto limit = [&](bool holds, const char* what) { is(holds, what, map.sizes[0], map.sizes[1], map.box[0], map.box[1]); };
  limit(reinterpret_cast<uintptr_t>(map.base) % 16 == 0, "TMA: the tensor is not aligned to 16 bytes");
  limit(map.aligned, "TMA: the map is not aligned to 64 bytes");
  limit(map.pitch % 16 == 0 && map.pitch < uint64_t{1} << 40, "TMA: pitch");
  for (int d = 0; d < 2; ++d) {
    limit(map.sizes[d] >= 1 && map.sizes[d] <= uint64_t{1} << 32, "TMA: size");
    limit(map.box[d] >= 1 && map.box[d] <= 256, "TMA: box");
    limit(map.step[d] >= 1 && map.step[d] <= 8, "TMA: step of elements");
  }
  limit(map.interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && 2 * map.box[0] % 16 == 0, "TMA: a row of a box is no multiple of 16 bytes");
  limit(map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B && 2 * map.box[0] <= 128, "TMA: a row of a box is longer than the swizzle");
}

// Nobody reads there.
const uint16_t* far(uint64_t address) { return reinterpret_cast<const uint16_t*>(address); }

void maps(int depth, int box_rows) {
  for (int64_t rows : {int64_t{128}, int64_t{384}, (int64_t{1} << 22) + 128, (int64_t{1} << 31) - 128})
    for (const uint16_t* base : {far(0x7f0000000000), far(0x7f0000000010), far(0x10)}) {
      encoded.clear();
      // With a name: GCC does not align the place of a result that is thrown away.
      [[maybe_unused]] const CUtensorMap map = encoded_map(base, rows, depth, box_rows);
      cute_says::make_tensor_map(base, rows, depth, box_rows);
      within_limits(encoded.at(0));
      is(encoded.size() == 2 && encoded[0] == encoded[1], "tensor_map", rows, depth, box_rows);
    }
}

// Boxes of a tile whose first row is `row` of its operand: together they fill it, each in its place.
void fills(const std::vector<Box>& boxes, size_t from, const emulator::TensorMap* map, int byte, const Tile& tile, int row) {
  for (int group = 0; group < tile.depth / GROUP; ++group) {
    const Box& box = boxes.at(from + group);
    is(box.map == map && box.column == group * GROUP && box.row == row, "a box of TMA", tile.rows, tile.depth, group, box.column, box.row);
    is(box.byte == byte + tile.along[group * GROUP], "where a box of TMA goes", tile.rows, tile.depth, group, box.byte);
    is(box.byte % ATOM_BYTES == 0, "a box of TMA is not aligned to its swizzle", tile.rows, tile.depth, group, box.byte);
  }
}

template <class W>
void boxes(const W& walk) {
  given = {};
  constexpr int COUNT = 5, I0 = 3 * W::BM, FIRST = 2;
  Rules rules{};
  rules.rows = rules.columns = 1 << 20;
  rules.own = rules.up = rules.down = NOWHERE;
  const emulator::TensorMap x{}, y{};
  walk.start(rules, {FIRST, FIRST + COUNT}, false, I0, false, 0);
  walk.bring_tiles(&x, &y, I0, [&](int n) { return walk.order().at(n) * W::BN; });
  constexpr int GROUPS = W::DEPTH / GROUP;
  is(given.boxes.size() == (1 + COUNT) * GROUPS, "the number of boxes", W::BN, W::DEPTH, given.boxes.size());
  fills(given.boxes, 0, &x, emulator::shared_address(walk.x()), cute_says::tile(W::BM, W::DEPTH), I0);
  for (int n = 0; n < COUNT; ++n)
    fills(given.boxes, (1 + n) * GROUPS, &y, emulator::shared_address(walk.y(n)), cute_says::tile(W::BN, W::DEPTH), (FIRST + n) * W::BN);
}

template <Kernel KERNEL, int DEPTH, bool CONTENT>
void walk() {
  using W = Walk<KERNEL, DEPTH, CONTENT>;
  const W one{shared};
  logits(one);
  boxes(one);
  maps(DEPTH, W::BM);
  maps(DEPTH, W::BN);
  if constexpr (KERNEL == Kernel::BACKWARD_ROWS) {
    gradients(one);
    left_operands<W>();
  }
}

template <Kernel KERNEL>
void walks() {
  walk<KERNEL, 64, false>(), walk<KERNEL, 128, false>(), walk<KERNEL, 256, false>();
  walk<KERNEL, 64, true>(), walk<KERNEL, 128, true>(), walk<KERNEL, 256, true>();
}

// ---------------------------------------------------------------- mma.sync, ldmatrix

void mma_sums() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 4; ++v)
      is(cute_says::mma_sum(lane, v) == Place{fragment_row(lane, v), fragment_column(lane, v)}, "sums of mma.sync", lane, v);
    // Weights become the left operand of the next product: registers 0, 1 are one block of sums, 2, 3 the next one.
    for (int v = 0; v < 8; ++v)
      is(cute_says::mma_left(lane, v) == Place{fragment_row(lane, v % 4), v / 4 * 8 + fragment_column(lane, v % 4)}, "sums as A", lane, v);
  }
}

// The number that lies at a byte of shared memory, of the parts of an operand, tiles behind each other.
struct Source {
  int part = -1, row = -1, column = -1;
};
class Sources {
 public:
  Sources(int byte, const Tile& tile, int parts) : from_(byte), of_(parts * tile.rows * tile.depth) {
    for (int part = 0; part < parts; ++part)
      for (int row = 0; row < tile.rows; ++row)
        for (int column = 0; column < tile.depth; ++column)
          of_.at((part * tile.rows * tile.depth * 2 + tile.along[row * tile.depth + column]) / 2) = {part, row, column};
  }
  Source at(int byte) const {
    const int place = byte - from_;
    return place < 0 || place % 2 || place / 2 >= static_cast<int>(of_.size()) ? Source{} : of_[place / 2];
  }

 private:
  int from_;
  std::vector<Source> of_;
};

// The source of half `e` of register `number` of a lane, given what all lanes of its warp pointed to.
Source loaded(const Sources& from, const std::vector<Given>& lanes, int lane, uint32_t number, int e) {
  const int load = static_cast<int>(number / 4);
  const Place at = cute_says::ldmatrix(lanes[lane].transposed.at(load), lane, static_cast<int>(number % 4) * 2 + e);
  return from.at(lanes[at.row].rows.at(load) + 2 * at.column);
}

// The copies of a stage, and its products: of every number in every register, the element of which operand it is.
template <class S>
void stage() {
  static bool seen = false;
  if (std::exchange(seen, true)) return;
  constexpr int K = S::CHUNK / 16, PRODUCTS = S::PARTS == 2 ? 3 : 1, Y = S::X_BYTES;
  const Tile &x = cute_says::tile(S::BM, S::CHUNK), &y = cute_says::tile(S::BN, S::CHUNK);
  const Sources of_x(0, x, S::PARTS), of_y(Y, y, S::PARTS);

  constexpr int FIRST = 2 * S::BM, COLUMN = S::FITS ? 0 : 3 * GROUP, DEPTH = S::FITS ? S::DEPTH : 5 * GROUP;
  given = {};
  for (thread = 0; thread < THREADS; ++thread) load_rows<S::BM, S::CHUNK, S::PARTS>(shared, nullptr, FIRST, COLUMN, DEPTH);
  is(given.copies.size() * UNIT == static_cast<size_t>(S::BM * S::CHUNK * S::PARTS), "the number of copies", S::BM, S::CHUNK, S::PARTS);
  for (const Copy& copy : given.copies)
    for (int e = 0; e < UNIT; ++e) {
      const Source to = of_x.at(copy.byte + 2 * e);
      const auto number = static_cast<int>(reinterpret_cast<intptr_t>(copy.from) / 2) + e;
      is(number == ((FIRST + to.row) * S::PARTS + to.part) * DEPTH + COLUMN + to.column, "a copy", S::BM, S::CHUNK, copy.byte, e, number);
    }

  for (int warp = 0; warp < WARPS; ++warp) {
    std::vector<Given> lanes;
    std::array<Strip<S::NB>, S::MT> c;
    for (int lane = 0; lane < 32; ++lane) {
      given = {};
      thread = warp * 32 + lane;
      multiply<S>(reinterpret_cast<Strip<S::NB>(&)[S::MT]>(c), shared, shared + Y);
      lanes.push_back(given);
    }
    is(lanes[0].warp_products.size() == static_cast<size_t>(K * S::NB * S::MT * PRODUCTS), "the number of products", S::BM, S::BN,
       S::CHUNK);
    for (int lane = 0; lane < 32; ++lane) {
      std::set<std::array<int, 4>> met;  // strip, block, step, parts
      for (size_t at = 0; at < lanes[lane].warp_products.size(); ++at) {
        const WarpProduct& one = lanes[lane].warp_products[at];
        const int place = static_cast<int>(one.c - &c[0][0][0]) / 4, strip = place / S::NB, nb = place % S::NB;
        const Source a0 = loaded(of_x, lanes, lane, one.a[0], 0), b0 = loaded(of_y, lanes, lane, one.b[0], 0);
        const int step = a0.column / 16;
        const int parts = 2 * a0.part + b0.part;
        is(met.insert({strip, nb, step, parts}).second && parts < 3, "a product twice, or of both low parts", S::BM, S::BN, warp, lane, at);
        for (int v = 0; v < 8; ++v) {
          const Source found = loaded(of_x, lanes, lane, one.a[v / 2], v % 2);
          const Place want = cute_says::mma_left(lane, v);
          is(found.part == a0.part && found.row == (warp * S::MT + strip) * 16 + want.row && found.column == step * 16 + want.column,
             "A of mma.sync", S::BM, S::CHUNK, warp, lane, at, v);
        }
        for (int v = 0; v < 4; ++v) {
          const Source found = loaded(of_y, lanes, lane, one.b[v / 2], v % 2);
          const Place want = cute_says::mma_right(lane, v);
          is(found.part == b0.part && found.row == nb * 8 + want.row && found.column == step * 16 + want.column, "B of mma.sync", S::BN,
             S::CHUNK, warp, lane, at, v);
        }
      }
    }
  }
  thread = 0;
}

// B of a gradient: rows of y~ as they lie, transposed by the instruction. backward.cuh reads them so.
void transposed() {
  for (int rows : {16, 32, 64})
    for (int depth : {64, 128, 256}) {
      const Sources from(0, cute_says::tile(rows, depth), 1);
      for (int nb = 0; nb < rows / 8; nb += 2)
        for (int d = 0; d < depth / 8; d += 2) {
          std::vector<Given> lanes;
          uint32_t b[4];
          for (int lane = 0; lane < 32; ++lane) {
            given = {};
            ldmatrix_transposed(b, shared + unit_byte(nb * 8 + bt_row(lane), d + bt_unit(lane), rows));
            lanes.push_back(given);
          }
          for (int lane = 0; lane < 32; ++lane)
            for (int two = 0; two < 2; ++two)
              for (int v = 0; v < 4; ++v) {
                const Source found = loaded(from, lanes, lane, b[2 * two + v / 2], v % 2);
                const Place want = cute_says::mma_right(lane, v);
                is(found.row == nb * 8 + want.column && found.column == (d + two) * 8 + want.row, "B of mma.sync, transposed", rows, depth,
                   nb, d, lane, two, v);
              }
        }
    }
}

template <Kernel KERNEL, bool CONTENT>
void stages() {
  Problem p{};
  for (p.parts = 1; p.parts <= 2; ++p.parts)
    for (int depth : {64, 128, 256, 320}) {
      p.depth = depth;
      if (KERNEL == Kernel::BACKWARD_ROWS && !fits(KERNEL, p.parts, depth)) continue;
      with_form<KERNEL, CONTENT>(p, [](auto form) { stage<decltype(form)>(); });
    }
}

}  // namespace

int main() {
  tiles();
  wgmma_sums();
  walks<Kernel::FORWARD_ROWS>();
  walks<Kernel::FORWARD_BOTH>();
  walks<Kernel::BACKWARD_ROWS>();
  mma_sums();
  transposed();
  stages<Kernel::FORWARD_ROWS, false>();
  stages<Kernel::FORWARD_ROWS, true>();
  stages<Kernel::BACKWARD_ROWS, false>();
  stages<Kernel::BACKWARD_ROWS, true>();
  stages<Kernel::WEIGHTS_BLOCK, false>();
  stages<Kernel::WEIGHTS_BLOCK, true>();
  std::printf("%lld checks, %lld wrong\n", static_cast<long long>(checks), static_cast<long long>(wrong));
  return wrong != 0;
}
