// A program that checks every value of csrc/cuda/index.h against the hardware, which is written down here a second time: ldmatrix, the
// fragments of mma.m16n8k16, the 128-byte swizzle. To be built with -fsanitize=address,undefined. Every wrong value is a line, and makes
// the exit status 1.
#include "index.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "tile.cuh"  // scatter_sums, needs_mask

using namespace fastnce::cuda;

namespace {

int64_t checks = 0, wrong = 0;

// At most this many lines are printed.
constexpr int64_t MOST_LINES = 40;

template <class... Where>
void check(bool holds, const char* what, const Where&... where) {
  ++checks;
  if (holds || ++wrong > MOST_LINES) return;
  std::string at;
  ((at += " " + std::to_string(where)), ...);
  std::printf("%s:%s\n", what, at.c_str());
}

// All functions are constexpr: a compiler can evaluate them too.
static_assert(unit_byte(9, 10, 64) >= 0 && fragment_row(31, 3) >= 0 && fragment_column(31, 3) >= 0);
static_assert(a_row(17) >= 0 && a_unit(17) >= 0 && b_row(17) >= 0 && b_unit(17) >= 0 && bt_row(17) >= 0 && bt_unit(17) >= 0);
static_assert(scattered_first(31, 32) >= 0 && ceil_div(5, 2) >= 0 && split_range(1, 2, 3).begin >= 0);
static_assert(circle_steps(2, 5) >= 0 && circle_block(4, 2, 5) >= 0 && !meets(0, 0, 128, 128, NOWHERE));
static_assert([] {
  Order order{};
  set_order(order, {0, 4}, false, 0, 64, 64, 250, false, 0, 0, NOWHERE, NOWHERE);
  return order.at(0) >= 0;
}());

// ---------------------------------------------------------------- shared memory

void swizzle() {
  for (int rows : {16, 32, 64, 128})
    for (int columns : {64, 128, 256}) {
      std::vector<bool> seen(rows * columns / UNIT);
      for (int unit = 0; unit < columns / UNIT; ++unit)
        for (int row = 0; row < rows; ++row) {
          const int byte = unit_byte(row, unit, rows);
          const bool inside = byte >= 0 && byte % 16 == 0 && byte / 16 < static_cast<int>(seen.size());
          check(inside && !seen[byte / 16], "unit_byte: not a bijection", rows, columns, row, unit);
          if (inside) seen[byte / 16] = true;
          // The swizzle of TMA and wgmma: bits 4..6 of an address are changed by bits 7..9.
          const int plain = unit / 8 * rows * 128 + row * 128 + unit % 8 * 16;
          check(byte == (plain ^ (plain >> 7 & 7) << 4), "unit_byte: not the 128-byte swizzle", rows, columns, row, unit);
          if (row + 8 > rows) continue;
          int banks = 0;
          for (int k = 0; k < 8; ++k) banks |= 1 << unit_byte(row + k, unit, rows) / 16 % 8;
          check(banks == 0xff, "unit_byte: bank conflict", rows, columns, row, unit);
        }
    }
}

// ---------------------------------------------------------------- fragments

struct Place {
  int row, column;
  bool operator==(const Place& other) const { return row == other.row && column == other.column; }
};
using Registers = std::array<std::array<Place, 2>, 4>;  // of one lane: two float16 each

// A tile whose elements are their own coordinates.
struct SharedTile {
  std::vector<Place> at;

  SharedTile(int rows, int columns) : at(rows * columns) {
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < columns; ++column) at[unit_byte(row, column / UNIT, rows) / 2 + column % UNIT] = {row, column};
  }
};

// PTX ISA, "ldmatrix": row k of matrix m is at the address of lane 8 m + k. Register m of a lane has two neighbours of row lane / 4 of
// matrix m, or with .trans of column lane / 4.
Registers ldmatrix_of(const SharedTile& tile, const std::array<int, 32>& byte_of_lane, int lane, bool transposed) {
  Registers r;
  for (int m = 0; m < 4; ++m)
    for (int e = 0; e < 2; ++e) {
      const int along = 2 * (lane % 4) + e, across = lane / 4;
      r[m][e] = tile.at[byte_of_lane[8 * m + (transposed ? along : across)] / 2 + (transposed ? across : along)];
    }
  return r;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": element i of a lane in A (16 x 16), B (16 x 8), C (16 x 8).
Place a_element(int lane, int i) {
  const bool upper = i < 2 || (i >= 4 && i < 6);
  return {(lane >> 2) + (upper ? 0 : 8), (lane & 3) * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place b_element(int lane, int i) { return {(lane & 3) * 2 + (i & 1) + (i < 2 ? 0 : 8), lane >> 2}; }
Place c_element(int lane, int i) { return {(lane >> 2) + (i < 2 ? 0 : 8), (lane & 3) * 2 + (i & 1)}; }

void accumulators() {
  std::set<std::pair<int, int>> seen;
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const Place is{fragment_row(lane, e), fragment_column(lane, e)};
      check(is == c_element(lane, e), "fragment_row, fragment_column", lane, e);
      check(is.row >= 0 && is.row < 16 && is.column >= 0 && is.column < 8 && seen.insert({is.row, is.column}).second,
            "fragment_row, fragment_column: twice", lane, e);
      // Of two neighbouring blocks, entry e of the left one is element e of A, entry e of the right one element 4 + e.
      for (int two = 0; two < 2; ++two)
        check(a_element(lane, 4 * two + e) == Place{is.row, 8 * two + is.column}, "accumulators as A", lane, e, two);
    }
  check(seen.size() == 128, "fragment_row, fragment_column: do not cover", static_cast<int>(seen.size()));
}

template <class RowOf, class UnitOf>
std::array<int, 32> bytes_of(const RowOf& row_of, const UnitOf& unit_of, int row, int unit, int rows) {
  std::array<int, 32> bytes{};
  for (int lane = 0; lane < 32; ++lane) bytes[lane] = unit_byte(row + row_of(lane), unit + unit_of(lane), rows);
  return bytes;
}

void operands() {
  for (int rows : {16, 32, 64, 128})
    for (int columns : {64, 128, 256}) {
      const SharedTile tile(rows, columns);
      for (int row = 0; row + 16 <= rows; row += 16)
        for (int unit = 0; unit + 2 <= columns / UNIT; unit += 2) {
          const auto a = bytes_of(a_row, a_unit, row, unit, rows), b = bytes_of(b_row, b_unit, row, unit, rows),
                     bt = bytes_of(bt_row, bt_unit, row, unit, rows);
          for (int lane = 0; lane < 32; ++lane) {
            const Registers left = ldmatrix_of(tile, a, lane, false), right = ldmatrix_of(tile, b, lane, false),
                            turned = ldmatrix_of(tile, bt, lane, true);
            for (int i = 0; i < 8; ++i) {
              const Place want = a_element(lane, i);
              check(left[i / 2][i % 2] == Place{row + want.row, unit * UNIT + want.column}, "a_row, a_unit", rows, row, unit, lane, i);
            }
            // Registers 2 two and 2 two + 1 are B of block `two`.
            for (int two = 0; two < 2; ++two)
              for (int i = 0; i < 4; ++i) {
                const Place want = b_element(lane, i);
                check(right[2 * two + i / 2][i % 2] == Place{row + 8 * two + want.column, unit * UNIT + want.row}, "b_row, b_unit", rows,
                      row, unit, lane, two, i);
                check(turned[2 * two + i / 2][i % 2] == Place{row + want.row, (unit + two) * UNIT + want.column}, "bt_row, bt_unit", rows,
                      row, unit, lane, two, i);
              }
          }
        }
    }
}

// scatter_sums itself, with numbers that name their column and row.
template <int NB>
void scatter() {
  std::vector<std::vector<double>> found(8 * NB);
  emulator::run(1, 32, 0, [&] {
    const int lane = thread_index();
    float sums[2 * NB];
    for (int c = 0; c < 2 * NB; ++c) sums[c] = static_cast<float>((c / 2 * 8 + fragment_column(lane, c % 2)) * 1024 + (1 << lane / 4));
    scatter_sums<NB>(sums);
    for (int k = 0; k < NB / 4; ++k) {
      const int c = scattered_first(lane, 2 * NB) + k;
      found[c / 2 * 8 + fragment_column(lane, c % 2)].push_back(sums[k]);
    }
  });
  for (int column = 0; column < 8 * NB; ++column)
    check(found[column] == std::vector<double>{column * 8 * 1024.0 + 255}, "scattered_first", NB, column,
          static_cast<int>(found[column].size()));
}

// ---------------------------------------------------------------- tiles of a walk

void splits() {
  for (int tiles = 0; tiles <= 12; ++tiles)
    for (int count = 1; count <= 8; ++count)
      for (int per_split = 0; per_split <= 14; ++per_split) {
        int next = 0;
        for (int split = 0; split < count; ++split) {
          const Range range = split_range(split, per_split, tiles);
          check(range.begin == next && range.end >= range.begin, "split_range", tiles, count, per_split, split);
          next = range.end;
        }
        check(next == std::min(tiles, count * per_split), "split_range: its end", tiles, count, per_split);
      }
  const int large[] = {1, 2, 1 << 15, 1 << 16, 46341, (1 << 30) - 1, 1 << 30, NOWHERE};
  for (int split : large)
    for (int per_split : large)
      for (int tiles : large) {
        const __int128 begin = static_cast<__int128>(split) * per_split, end = begin + per_split;
        const Range range = split_range(split, per_split, tiles);
        check(range.begin == std::min<__int128>(begin, tiles) && range.end == std::min<__int128>(end, tiles), "split_range", split,
              per_split, tiles);
      }
}

void circle() {
  for (int blocks = 1; blocks <= 40; ++blocks) {
    std::vector<int> met(blocks * blocks);
    for (int block = 0; block < blocks; ++block) {
      check(circle_block(block, 0, blocks) == block, "circle_block: not on the diagonal first", blocks, block);
      check(circle_steps(block, blocks) <= blocks / 2 + 1, "circle_steps: more than the grid is for", blocks, block);
      for (int step = 0; step < circle_steps(block, blocks); ++step) {
        const int other = circle_block(block, step, blocks);
        check(other >= 0 && other < blocks, "circle_block", blocks, block, step);
        if (other >= 0 && other < blocks) ++met[std::min(block, other) * blocks + std::max(block, other)];
      }
    }
    for (int a = 0; a < blocks; ++a)
      for (int b = a; b < blocks; ++b) check(met[a * blocks + b] == 1, "circle: a pair of blocks", blocks, a, b, met[a * blocks + b]);
  }
}

// Whether the line j - i == diagonal crosses a tile, by the definition, row by row.
bool crosses(int i0, int j0, int rows, int columns, int diagonal) {
  for (int64_t i = i0; i < static_cast<int64_t>(i0) + rows; ++i)
    if (i + diagonal >= j0 && i + diagonal < static_cast<int64_t>(j0) + columns) return true;
  return false;
}

void diagonals() {
  for (int i0 = 0; i0 < 9; ++i0)
    for (int j0 = 0; j0 < 9; ++j0)
      for (int rows = 1; rows < 6; ++rows)
        for (int columns = 1; columns < 6; ++columns)
          for (int diagonal = -16; diagonal <= 16; ++diagonal)
            check(meets(i0, j0, rows, columns, diagonal) == crosses(i0, j0, rows, columns, diagonal), "meets", i0, j0, rows, columns,
                  diagonal);
  const int last = (1 << 30) - 128;
  for (int i0 : {0, 128, last - 128, last})
    for (int j0 : {0, 128, last - 128, last})
      for (int diagonal :
           {NOWHERE, NOWHERE - 1, -NOWHERE, last + 127, last + 128, -last - 127, -last - 128, last, -last, 0, 127, -127, 128})
        check(meets(i0, j0, 128, 128, diagonal) == crosses(i0, j0, 128, 128, diagonal), "meets", i0, j0, 128, 128, diagonal);
  for (int i0 = 0; i0 < 12; i0 += 4)
    for (int j0 = 0; j0 < 12; j0 += 4)
      for (int rows = 1; rows < 12; rows += 3)
        for (int columns = 1; columns < 12; columns += 3)
          for (int own : {0, NOWHERE})
            for (int up : {-9, -3, 0, 1, 5, 9, NOWHERE})
              for (int down : {-5, 2, 7, NOWHERE}) {
                Rules r{};
                r.rows = rows;
                r.columns = columns;
                r.own = own;
                r.up = up;
                r.down = down;
                bool some = false;
                for (int i = i0; i < i0 + 4; ++i)
                  for (int j = j0; j < j0 + 4; ++j) some |= i >= rows || j >= columns || j - i == own || j - i == up || j - i == down;
                check(needs_mask(r, i0, j0, 4, 4) == some, "needs_mask", i0, j0, rows, columns, own, up, down);
              }
}

// ---------------------------------------------------------------- order of a walk

void order(Range steps, bool all_masked, int i0, int rows, int width, int columns, bool circle, int first, int own, int up, int down) {
  const auto is = [&](bool holds, const char* what) {
    check(holds, what, steps.begin, steps.end, all_masked, i0, rows, width, columns, circle, first, own, up, down);
  };
  Order found;
  set_order(found, steps, all_masked, i0, rows, width, columns, circle, first, own, up, down);
  const int count = std::max(0, steps.end - steps.begin), across = ceil_div(columns, width);
  is(found.count == count && found.plain >= 0 && found.plain <= count, "set_order: how many");
  is(found.extra >= 0 && found.extra <= MOST_MASKED, "set_order: more than MOST_MASKED");
  std::vector<int> seen(count);
  int before = -1;
  for (int n = 0; n < count; ++n) {
    const int step = found.at(n), at = step - steps.begin;
    is(at >= 0 && at < count && !seen[at]++, "set_order: a step left out or twice");
    if (n == 0 || n == found.plain) before = -1;
    is(step > before, "set_order: not ascending");
    before = step;
    const int tile = circle ? circle_block(first, step, across) : step, j0 = tile * width;
    const bool masked = all_masked || j0 + width > columns || crosses(i0, j0, rows, width, own) || crosses(i0, j0, rows, width, up) ||
                        crosses(i0, j0, rows, width, down);
    is(masked == (n >= found.plain), "set_order: plain or not");
  }
}

// Every range of the steps of a block of rows, straight and round the circle.
void orders(int block, int rows, int width, int columns, int own, int up, int down, bool every_range) {
  const int across = ceil_div(columns, width), i0 = block * rows;
  for (int begin = 0; begin <= across; begin += every_range ? 1 : across)
    for (int end = begin; end <= across; end += every_range ? 1 : std::max(across, 1)) {
      order({begin, end}, false, i0, rows, width, columns, false, 0, own, up, down);
      if (rows == width) order({begin, end}, false, i0, rows, width, columns, true, block % across, own, up, down);
    }
  order({0, across}, true, i0, rows, width, columns, false, 0, own, up, down);
  if (rows == width && block < across) order({0, circle_steps(block, across)}, false, i0, rows, width, columns, true, block, own, up, down);
}

void all_orders() {
  // Tiles scaled down by 16: every diagonal alone, with that of self, and with its mirror image.
  for (int width : {2, 4, 8})
    for (int columns = 1; columns <= 33; ++columns)
      for (int block = 0; block * 8 <= columns; ++block)
        for (int up = -34; up <= 34; ++up) {
          orders(block, 8, width, columns, NOWHERE, up, NOWHERE, columns < 20 && up % 3 == 0);
          orders(block, 8, width, columns, 0, up, NOWHERE, false);
          orders(block, 8, width, columns, 0, up, -up, columns < 20 && up % 5 == 0);
        }
  std::mt19937 random(0);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  for (int n = 0; n < 20000; ++n) {
    const int rows = 128, width = 32 << below(3), columns = 1 + below(n % 2 ? 700 : 130), block = below(columns / rows + 1);
    const auto diagonal = [&] { return below(4) == 0 ? NOWHERE : below(2 * columns + 300) - columns - 150; };
    orders(block, rows, width, columns, diagonal(), diagonal(), diagonal(), false);
  }
  // Large indices, far from the first step.
  const int last = (1 << 30) - 512, tiles = (1 << 30) / 128;
  for (int up : {NOWHERE - 1, -NOWHERE, -last, 0, 300, -300, last})
    for (int block : {0, last / 128, last / 128 + 3}) {
      order({tiles - 6, tiles}, false, block * 128, 128, 128, 1 << 30, false, 0, 0, up, NOWHERE);
      order({0, 6}, false, block * 128, 128, 128, (1 << 30) - 5, true, block, 0, up, -up);
      order({tiles - 6, tiles}, false, block * 128, 128, 128, (1 << 30) - 5, true, block, 0, up, -up);
    }
}

}  // namespace

int main() {
  swizzle();
  accumulators();
  operands();
  scatter<4>();
  scatter<8>();
  scatter<16>();
  splits();
  circle();
  diagonals();
  all_orders();
  std::printf("%lld checks, %lld wrong\n", static_cast<long long>(checks), static_cast<long long>(wrong));
  return wrong != 0;
}
