// The order in which the blocks of the logits are visited. It has rounds, and the blocks of a round share neither rows nor columns. So
// every row gets its additions in the order of the rounds, whichever thread computes them: results have the same bits for any number of
// threads, without a lock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace fastnce {

struct Block {
  int64_t row, column;  // in blocks
  int64_t group;        // the sums of its shorter side go to those of this group
};

// A walk over rows x columns blocks. A round has places, whose blocks are computed at the same time. Threads get equal runs of places, and
// every place has a block, so that no thread is without work.
struct Walk {
  int64_t rows, columns;
  bool symmetric;
  int64_t groups;

  // Where k is q, a tournament. Round 0 has the blocks on the diagonal. In every other round each block row meets one other; of an odd
  // number of block rows one rests.
  //
  // Elsewhere every block of the shorter side has a block of the longer side, and the next one in the next round. A batch against a queue
  // has few blocks on its shorter side, too few for several threads. There the longer side is cut into groups: each has its own sums of the
  // shorter side, which are added in their order at the end. The number of groups never depends on the number of threads, because the order
  // of the additions depends on it. `apart`: whether the caller has sums for every group.
  static Walk of(int64_t rows, int64_t columns, bool symmetric, bool apart) {
    const int64_t few = std::min(rows, columns), many = std::max(rows, columns);
    return {rows, columns, symmetric, symmetric || !apart ? 1 : std::max<int64_t>(1, std::min(PLACES, many) / few)};
  }

  int64_t shorter() const { return std::min(rows, columns); }
  int64_t longer() const { return std::max(rows, columns); }
  int64_t teams() const { return rows + rows % 2; }

  int64_t rounds() const { return !symmetric ? (longer() + groups - 1) / groups : rows > 1 ? teams() : 1; }

  int64_t places(int64_t round) const {
    if (symmetric) return round == 0 ? rows : rows / 2;
    // The first groups have a block more than the others.
    return shorter() * (round < longer() / groups ? groups : longer() % groups);
  }

  Block at(int64_t round, int64_t place) const {
    if (!symmetric) {
      const int64_t group = place / shorter(), own = place % shorter(), size = longer() / groups, more = longer() % groups;
      const int64_t first = group * size + std::min(group, more);
      const int64_t other = first + (own + round) % (size + (group < more ? 1 : 0));
      return rows <= columns ? Block{own, other, group} : Block{other, own, group};
    }
    if (round == 0) return {place, place, 0};
    // The circle method: one team stays, the others turn by one place a round. With an odd number of teams the one that stays does not
    // exist, and place 0 is left out.
    const int64_t n = teams(), turn = round - 1, at = place + rows % 2;
    int64_t a = at == 0 ? n - 1 : (turn + at) % (n - 1);
    int64_t b = at == 0 ? turn : (turn - at + n - 1) % (n - 1);
    if (a > b) std::swap(a, b);
    return {a, b, 0};
  }

 private:
  static constexpr int64_t PLACES = 16;  // enough for the cores of most machines
};

// Rows and columns of a block: a multiple of the 64 columns of a panel and, from 192 on, of the 6 rows of a register block. Small problems
// have smaller blocks, so that there are enough for several threads. The size never depends on the number of threads, because the order of
// the additions depends on it.
constexpr int64_t block_size(int64_t m, int64_t n) {
  const int64_t rows = std::max(m, n);
  return rows >= 6144 ? 384 : rows >= 1536 ? 192 : 64;
}

}  // namespace fastnce
