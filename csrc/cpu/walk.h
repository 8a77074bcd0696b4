// In which order the blocks of the logits are visited: in rounds, whose blocks share neither rows nor columns. Every row then gets its
// additions in the order of the rounds, whoever computes them: results are the same bits for any number of threads, without a lock.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastnce {

struct Block {
  int64_t row, column;  // in blocks; column < 0: no block
};

// Rounds and blocks per round of a walk over rows x columns blocks.
struct Walk {
  int64_t rows, columns;
  bool symmetric;

  // Where k is q, a tournament: round 0 has the blocks on the diagonal, and in each other round every block row meets one other.
  int64_t teams() const { return rows + rows % 2; }
  int64_t rounds() const { return symmetric ? teams() : std::max(rows, columns); }
  int64_t places() const { return symmetric ? teams() : std::max(rows, columns); }

  Block at(int64_t round, int64_t place) const {
    if (!symmetric) {
      const int64_t column = (place + round) % std::max(rows, columns);
      return place < rows && column < columns ? Block{place, column} : Block{0, -1};
    }
    if (round == 0) return place < rows ? Block{place, place} : Block{0, -1};
    // The circle method: one team stays, the others turn by one place a round.
    const int64_t n = teams(), turn = round - 1;
    if (place >= n / 2) return {0, -1};
    int64_t a = place == 0 ? n - 1 : (turn + place) % (n - 1);
    int64_t b = place == 0 ? turn : (turn - place + n - 1) % (n - 1);
    if (a > b) std::swap(a, b);
    return b < rows ? Block{a, b} : Block{0, -1};
  }
};

// Rows and columns of a block: a multiple of the panel's 64 and of the register block's 6 rows. Smaller ones where there would be too few
// to keep threads busy. Never by the number of threads: the order of additions depends on it.
constexpr int64_t block_size(int64_t m, int64_t n) {
  const int64_t rows = std::max(m, n);
  return rows >= 6144 ? 384 : rows >= 1536 ? 192 : 64;
}

}  // namespace fastnce
