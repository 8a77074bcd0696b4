// A random problem of the kernels over tiles: its tensors, its logits and statistics by the definition in double, and limits of the
// kernels' errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "emulator.h"
#include "index.h"
#include "launch.h"

using namespace fastnce::cuda;

namespace {

constexpr double NONE = -INFINITY, LN2 = 0.6931471805599453, LOG2E_EXACT = 1 / LN2;
constexpr double U = 1.0 / (1 << 24);  // of a float32, half a unit of its last place
const float POISON = std::nanf("0x2a");
constexpr int POISON_INT = 0x5bd1e995;
constexpr uint16_t POISON_HALF = 0x7e2a;
constexpr const char* NAMES[] = {"forward_rows", "forward_both", "retrieval", "backward_rows", "weights_block"};

// The form of a kernel, the sizes of a problem, the rules of its pairs.
struct Case {
  Kernel kernel;
  int family;
  bool content;
  int depth, parts;
  int m, n;
  bool symmetric, labels, excludes, masked, in_tile;
  int own, up, down;
  float reach;  // largest |logit|; up to 40 the unshifted kernels run
  bool of_rows, of_columns;
  int splits;
};

int up_to(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

// The tensors of a problem, and its logits by the definition. The padding of vectors is bait: nan, and ids that match.
struct Data {
  Case c;
  std::vector<uint16_t> x, y;
  std::vector<float> a, b;
  std::vector<int> ids[4];
  std::vector<uint8_t> mask;
  float scale, bound;
  Problem p{};
  std::vector<float> x_real, y_real;  // (rows, depth): the operands as they are
  std::vector<double> t;              // (m, n)
  std::vector<uint8_t> kind;          // (m, n): 0 negative, 1 positive, 2 neither
  double most_t = 0;                  // no |t| of unrounded operands is larger, by their lengths

  std::vector<uint16_t> operand(int rows, const std::vector<float>* like, std::vector<float>& values, double stretch,
                                std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> out(static_cast<size_t>(up_to(rows, 128)) * c.parts * c.depth, 0);
    values.assign(static_cast<size_t>(rows) * c.depth, 0.0f);
    for (int i = 0; i < rows; ++i) {
      // The rows of aligned pairs, or without them of some others, are alike: one that is counted as another kind is then seen.
      const int step = c.up == NOWHERE ? 0 : c.up, of = i - step;
      const float* other = nullptr;
      if (like && c.up == NOWHERE) other = &(*like)[static_cast<size_t>(i) % c.m * c.depth];
      if (like && c.up != NOWHERE && of >= 0 && of < c.m) other = &(*like)[static_cast<size_t>(of) * c.depth];
      if (!like && c.symmetric && step > 0 && of >= 0) other = &values[static_cast<size_t>(of) * c.depth];
      for (int l = 0; l < c.depth; ++l) {
        const float noise = normal(random) * static_cast<float>(stretch / std::sqrt(c.depth)),
                    v = other ? 0.9f * other[l] + 0.4f * noise : noise;
        const uint16_t high = emulator::float_to_half(v), low = emulator::float_to_half(v - emulator::half_to_float(high));
        out[(static_cast<size_t>(i) * c.parts) * c.depth + l] = high;
        if (c.parts == 2) out[(static_cast<size_t>(i) * c.parts + 1) * c.depth + l] = low;
        values[static_cast<size_t>(i) * c.depth + l] = emulator::half_to_float(high) + (c.parts == 2 ? emulator::half_to_float(low) : 0.0f);
      }
    }
    return out;
  }

  Data(const Case& made, std::mt19937& random) : c(made) {
    const double stretch = 1 << random() % 6;
    x = operand(c.m, nullptr, x_real, stretch, random);
    if (c.symmetric)
      y = x, y_real = x_real;
    else
      y = operand(c.n, &x_real, y_real, stretch, random);
    const auto factors = [&](int rows) {
      std::vector<float> out(up_to(rows, 128), POISON);
      for (int i = 0; i < rows; ++i) out[i] = static_cast<float>((0.9 + 0.2 * (random() % 1024) / 1024) / stretch);
      return out;
    };
    a = factors(c.m);
    b = c.symmetric ? a : factors(c.n);
    const auto vector = [&](int which, int rows, int values, int nothing) {
      ids[which].assign(up_to(rows, 128), 0);
      for (int i = 0; i < rows; ++i) {
        const int id = static_cast<int>(random() % values) - 1;
        ids[which][i] = id < 0 ? nothing : id;
      }
    };
    for (int kind = 0; kind < 2; ++kind) {
      vector(2 * kind, c.m, kind ? 7 : 9, -2);
      vector(2 * kind + 1, c.n, kind ? 7 : 9, -1);
      if (!c.symmetric) continue;
      ids[2 * kind + 1] = ids[2 * kind];
      for (int& id : ids[2 * kind + 1]) id = id == -2 ? -1 : id;
    }
    Rules& r = p.rules;
    if (c.labels) r.q_label = ids[0].data(), r.k_label = ids[1].data();
    if (c.excludes) r.q_exclude = ids[2].data(), r.k_exclude = ids[3].data();
    r.mask_rows = r.mask_columns = 1;
    if (c.masked) {
      r.mask_rows = c.symmetric ? (c.m + 1) / 2 : std::max(1, c.m / 2);
      r.mask_columns = c.symmetric ? r.mask_rows : std::max(1, c.n / 3);
      mask.resize(r.mask_rows * r.mask_columns);
      const bool turned = random() % 2;
      r.mask_row = turned ? 1 : r.mask_columns;
      r.mask_column = turned ? r.mask_rows : 1;
      for (int i = 0; i < r.mask_rows; ++i)
        for (int j = 0; j < r.mask_columns; ++j) {
          const bool mirrored = c.symmetric && j < i;
          uint8_t& at = mask[i * r.mask_row + j * r.mask_column];
          at = mirrored ? mask[j * r.mask_row + i * r.mask_column] : random() % 6 == 0;
        }
      r.mask = mask.data();
    }
    r.rows = c.m;
    r.columns = c.n;
    r.own = c.own;
    r.up = c.up;
    r.down = c.down;
    r.in_tile = c.in_tile;
    p.x = x.data();
    p.y = c.symmetric ? x.data() : y.data();
    p.a = a.data();
    p.b = c.symmetric ? a.data() : b.data();
    p.scale = &scale;
    p.bound = &bound;
    p.row_padded = up_to(c.m, 128);
    p.column_padded = up_to(c.n, 128);
    p.parts = c.parts;
    p.depth = c.depth;

    t.resize(static_cast<size_t>(c.m) * c.n);
    kind.resize(t.size());
    double largest = 1e-30;
    for (int i = 0; i < c.m; ++i)
      for (int j = 0; j < c.n; ++j) {
        const float *u = &x_real[static_cast<size_t>(i) * c.depth], *v = &y_real[static_cast<size_t>(j) * c.depth];
        double sum = 0;
        for (int l = 0; l < c.depth; ++l) sum += static_cast<double>(u[l]) * v[l];
        largest = std::max(largest, std::fabs(t[at(i, j)] = sum * a[i] * b[j]));
        kind[at(i, j)] = what(i, j);
      }
    scale = static_cast<float>(c.reach / largest);
    bound = c.reach;
    for (double& value : t) value *= scale * LOG2E_EXACT;
    const auto longest = [&](const std::vector<float>& rows, const std::vector<float>& factor, int count) {
      double most = 0;
      for (int i = 0; i < count; ++i) {
        double square = 0;
        for (int l = 0; l < c.depth; ++l) square += std::pow(rows[static_cast<size_t>(i) * c.depth + l], 2);
        most = std::max(most, std::sqrt(square) * factor[i]);
      }
      return most;
    };
    most_t = scale * LOG2E_EXACT * longest(x_real, a, c.m) * longest(y_real, b, c.n);
  }

  size_t at(int i, int j) const { return static_cast<size_t>(i) * c.n + j; }

  // The rules in the order of fastnce/pairs.py.
  uint8_t what(int i, int j) const {
    const Rules& r = p.rules;
    if (j - i == r.own) return 2;
    if (j - i == r.up || j - i == r.down) return r.in_tile ? 1 : 2;
    if (c.excludes && ids[2][i] == ids[3][j]) return 2;
    if (c.labels && ids[0][i] == ids[1][j]) return 1;
    return r.mask && r.mask[i % r.mask_rows * r.mask_row + j % r.mask_columns * r.mask_column] ? 1 : 0;
  }

  // Limit of the error of t. 16 products at a time are added to a sum of at most |x| |y|, and cut off. In two parts there are three
  // products, and that of both low halves, below 2^-22, is left out. The factors have six more roundings.
  double error_of_t() const { return most_t * ((c.parts == 2 ? 3 : 1) * c.depth / 16 * 2 + 6 + (c.parts == 2 ? 4 : 0)) * U; }
  // Limit of the relative error of 2^(t - base): the difference is rounded, and exp2 has 2^-22.
  double error_of_exp(double base) const { return LN2 * (error_of_t() + (most_t + std::fabs(base)) * U) * 1.01 + 8 * U; }
  // Limit of the relative error of a sum of these over a row or a column, rescaled once for every tile.
  double error_of_sum() const { return error_of_exp(most_t) + (std::max(c.m, c.n) + 8 * 40) * U; }
};

int cases = 0, failures = 0;
// After this many lines the program stops.
constexpr int MOST_LINES = 25;

void check(const char* what, const Data& data, int row, double error, double limit) {
  if (error <= limit) return;  // not so for nan
  const Case& c = data.c;
  std::printf(
      "%s %s %s: row %d: error %g, limit %g: %d x %d x %d parts %d symmetric %d diagonals %d %d %d labels %d excludes %d mask %d in_tile "
      "%d "
      "reach %g sides %d %d splits %d\n",
      NAMES[static_cast<int>(c.kernel)], c.family == WGMMA ? "wgmma" : "mma", what, row, error, limit, c.m, c.n, c.depth, c.parts,
      c.symmetric, c.own, c.up, c.down, c.labels, c.excludes, c.masked, c.in_tile, c.reach, c.of_rows, c.of_columns, c.splits);
  if (++failures < MOST_LINES) return;
  std::printf("%d cases, more than %d wrong\n", cases, failures - 1);
  std::fflush(stdout);
  std::exit(1);
}

Grid grid_of(int steps, int splits) { return {splits, ceil_div(steps, splits)}; }

TileShape tile(const Case& c) { return tile_of(c.kernel, c.content, c.parts, c.depth, c.family == WGMMA ? 90 : 80); }

// Statistics of a row by the definition, or with `turned` of a column.
struct Truth {
  double lse[2] = {NONE, NONE}, pos = 0, pos_size = 0;
  int n_pos = 0;

  Truth(const Data& data, int row, bool turned) {
    double top[2] = {NONE, NONE}, sum[2] = {};
    for (int pass = 0; pass < 2; ++pass)
      for (int other = 0; other < (turned ? data.c.m : data.c.n); ++other) {
        const size_t at = turned ? data.at(other, row) : data.at(row, other);
        const int kind = data.kind[at];
        if (kind == 2) continue;
        const double t = data.t[at];
        if (pass == 0) {
          top[kind] = std::max(top[kind], t);
          if (kind == 1) pos += t, pos_size += std::fabs(t), ++n_pos;
        } else {
          sum[kind] += std::exp2(t - top[kind]);
        }
      }
    for (int kind = 0; kind < 2; ++kind)
      if (top[kind] != NONE) lse[kind] = top[kind] + std::log2(sum[kind]);
  }

  double error_of_pos(const Data& data) const { return n_pos * data.error_of_t() + pos_size * (n_pos + 4) * 2 * U; }
};

}  // namespace
