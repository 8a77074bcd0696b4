// In which order the blocks of the logits are visited: in rounds, whose blocks share neither rows nor columns. Every row then gets its
// additions in the order of the rounds, whoever computes them: results are the same bits for any number of threads, without a lock.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace fastnce {

struct Block {
  int64_t row, column;  // in blocks
  int64_t group;        // whose own sums its shorter side is added to
};

// A walk over rows x columns blocks, in rounds of places that run side by side.
//
// Threads get equal runs of places, so that a place without a block would be a thread without work: there is none.
struct Walk {
  int64_t rows, columns;
  bool symmetric;
  int64_t groups;

  // Where k is q, a tournament: round 0 has the blocks on the diagonal, and in each other round every block row meets one other; of an odd
  // number of them one rests.
  //
  // Elsewhere every block of the shorter side takes its own one of the longer side, and the next one in the next round. Where the shorter
  // side has few blocks, as a batch has against a queue, that is too little for several threads: the longer side is cut into groups, and
  // each keeps sums of its own for the shorter side, added in their order at the end. Never by the number of threads: the order of
  // additions depends on it. `apart`: whether the caller has such sums.
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
    // The circle method: one team stays, the others turn by one place a round. Where their number is odd, the one that would stay is not
    // there: place 0 is left out.
    const int64_t n = teams(), turn = round - 1, at = place + rows % 2;
    int64_t a = at == 0 ? n - 1 : (turn + at) % (n - 1);
    int64_t b = at == 0 ? turn : (turn - at + n - 1) % (n - 1);
    if (a > b) std::swap(a, b);
    return {a, b, 0};
  }

 private:
  static constexpr int64_t PLACES = 16;  // from here on, enough for the cores of most machines
};

// Rows and columns of a block: a multiple of the panel's 64 and of the register block's 6 rows. Smaller ones where there would be too few
// to keep threads busy. Never by the number of threads: the order of additions depends on it.
constexpr int64_t block_size(int64_t m, int64_t n) {
  const int64_t rows = std::max(m, n);
  return rows >= 6144 ? 384 : rows >= 1536 ? 192 : 64;
}

}  // namespace fastnce
