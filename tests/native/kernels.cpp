// A program that runs the CUDA kernels in the emulator, without torch, to be built with -fsanitize=address,undefined. Every form of every
// kernel solves random ragged problems (case.h) under every rule, and is compared with the definition in double on the same float16
// operands. Buffers have exactly the documented size, and results are poisoned before. Every wrong number is a line, and makes the exit
// status 1.
//
//     kernels [forward_rows | forward_both | retrieval | backward_rows | weights_block] [mma | wgmma]
#include <string>

#include "case.h"
#include "wgmma_forms.h"

// Weak definitions, for a program that has some of the units: they are called where no other unit defines the kernel.
namespace fastnce::cuda {
#define ABSENT __attribute__((weak)) void
[[noreturn]] static void absent() { emulator::fail("a kernel that is no part of this program"); }
ABSENT wgmma_forward_rows(const Problem&, const Grid&, const RowSums&, Stream) { absent(); }
ABSENT wgmma_forward_both(const Problem&, const Grid&, const BothSums&, Stream) { absent(); }
ABSENT wgmma_backward_rows(const Problem&, const Grid&, const Weights&, const RowGradient&, Stream) { absent(); }
ABSENT forward_rows(const Problem& p, const Grid& g, const RowSums& out, int family, Stream s) {
  family == WGMMA ? wgmma_forward_rows(p, g, out, s) : absent();
}
ABSENT forward_both(const Problem& p, const Grid& g, const BothSums& out, int family, Stream s) {
  family == WGMMA ? wgmma_forward_both(p, g, out, s) : absent();
}
ABSENT backward_rows(const Problem& p, const Grid& g, const Weights& w, const RowGradient& out, int family, Stream s) {
  family == WGMMA ? wgmma_backward_rows(p, g, w, out, s) : absent();
}
ABSENT retrieval(const Problem&, const Grid&, const Retrieval&, Stream) { absent(); }
ABSENT weights_block(const Problem&, const Weights&, const Block&, Stream) { absent(); }
}  // namespace fastnce::cuda

namespace {

void forward_rows(const Data& data, bool always) {
  const Case& c = data.c;
  const Grid grid = grid_of(ceil_div(c.n, tile(c).columns), c.splits);
  const int each = c.splits * c.m, fields = c.in_tile ? 5 : 2;
  std::vector<float> sums(fields * each, POISON);
  std::vector<int> count(c.in_tile ? each : 0, POISON_INT);
  forward_rows(data.p, grid, {sums.data(), c.in_tile ? count.data() : nullptr, always}, c.family, nullptr);
  const bool runs = always || !(data.bound <= 40);
  for (int i = 0; i < c.m; ++i) {
    const Truth truth(data, i, false);
    double sum[2] = {}, pos = 0;
    int n_pos = 0;
    for (int kind = 0; kind < fields / 2; ++kind) {
      double top = NONE;
      const auto field = [&](int f, int split) { return sums[(2 * kind + f) * each + split * c.m + i]; };
      for (int split = 0; split < c.splits; ++split) {
        top = std::max(top, static_cast<double>(field(0, split)));
        check("top is nan", data, i, std::isnan(field(0, split)), 0);
      }
      for (int split = 0; split < c.splits; ++split) sum[kind] += field(1, split) * (top == NONE ? 1 : std::exp2(field(0, split) - top));
      const double found = sum[kind] == 0 ? NONE : std::log2(sum[kind]) + top, wanted = runs ? truth.lse[kind] : NONE;
      check(kind ? "lse_pos" : "lse_neg", data, i, found == wanted ? 0 : std::fabs(found - wanted), 1.5 * data.error_of_sum());
    }
    if (!c.in_tile) continue;
    for (int split = 0; split < c.splits; ++split) {
      pos += sums[4 * each + split * c.m + i];
      n_pos += count[split * c.m + i];
    }
    check("pos", data, i, std::fabs(pos - (runs ? truth.pos : 0)), truth.error_of_pos(data));
    check("n_pos", data, i, std::abs(n_pos - (runs ? truth.n_pos : 0)), 0);
  }
}

void forward_both(const Data& data) {
  const Case& c = data.c;
  const int across = ceil_div(c.n, tile(c).columns), fields = c.in_tile ? 3 : 1;
  const Grid grid = grid_of(c.symmetric ? across / 2 + 1 : across, c.splits);
  // The kernel adds to these.
  std::vector<float> sums[2] = {std::vector<float>(fields * c.m, 0.0f), std::vector<float>(fields * c.n, 0.0f)};
  std::vector<int> counts[2] = {std::vector<int>(c.in_tile ? c.m : 0, 1000), std::vector<int>(c.in_tile ? c.n : 0, 1000)};
  const int other = c.symmetric ? 0 : 1;
  const auto counted = [&](int side) { return c.in_tile ? counts[side].data() : nullptr; };
  forward_both(data.p, grid, {sums[0].data(), counted(0), sums[other].data(), counted(other), c.symmetric}, c.family, nullptr);
  const bool runs = data.bound <= 40;
  for (int side = 0; side <= other; ++side) {
    const int rows = side ? c.n : c.m;
    for (int i = 0; i < rows; ++i) {
      const Truth truth(data, i, side);
      for (int kind = 0; kind < (c.in_tile ? 2 : 1); ++kind) {
        const double found = sums[side][kind * rows + i], wanted = runs ? std::exp2(truth.lse[kind]) : 0;
        check(kind ? "sum of positives" : "sum of negatives", data, i, std::fabs(found - wanted), wanted * data.error_of_sum());
      }
      if (!c.in_tile) continue;
      check("pos", data, i, std::fabs(sums[side][2 * rows + i] - (runs ? truth.pos : 0)), truth.error_of_pos(data));
      check("n_pos", data, i, std::abs(counts[side][i] - 1000 - (runs ? truth.n_pos : 0)), 0);
    }
  }
}

void retrieval(const Data& data, std::mt19937& random) {
  const Case& c = data.c;
  const Grid grid = grid_of(ceil_div(c.n, tile(c).columns), c.splits);
  const int each = c.splits * c.m;
  const double limit = data.error_of_t();
  std::vector<float> bounds(2 * c.m), largest(2 * each, POISON);
  std::vector<int> counted(3 * each, POISON_INT);
  for (int i = 0; i < c.m; ++i) {
    const double threshold = data.t[data.at(i, static_cast<int>(random() % c.n))];
    bounds[i] = static_cast<float>(threshold - 3 * limit);
    bounds[c.m + i] = static_cast<float>(threshold + 3 * limit);
  }
  retrieval(data.p, grid, {bounds.data(), largest.data(), counted.data()}, nullptr);
  for (int i = 0; i < c.m; ++i) {
    double best[2] = {NONE, NONE}, found[2] = {NONE, NONE};
    int where = -1, counts[2] = {}, surely[2] = {}, perhaps[2] = {};
    for (int split = 0; split < c.splits; ++split) {
      const int at = split * c.m + i;
      for (int kind = 0; kind < 2; ++kind) check("best is nan", data, i, std::isnan(largest[kind * each + at]), 0);
      if (largest[at] > found[0]) where = counted[2 * each + at];
      for (int kind = 0; kind < 2; ++kind) found[kind] = std::max<double>(found[kind], largest[kind * each + at]);
      for (int n = 0; n < 2; ++n) counts[n] += counted[n * each + at];
      if (largest[at] == -INFINITY) check("nowhere", data, i, counted[2 * each + at] + 1, 0);
    }
    for (int j = 0; j < c.n; ++j) {
      const int kind = data.kind[data.at(i, j)];
      if (kind == 2) continue;
      const double t = data.t[data.at(i, j)];
      best[kind] = std::max(best[kind], t);
      if (kind == 1) continue;
      const double low = bounds[i], high = bounds[c.m + i];
      surely[0] += t > high + limit;
      perhaps[0] += t > high - limit;
      surely[1] += t > low + limit && t < high - limit;
      perhaps[1] += t > low - limit && t < high + limit;
    }
    for (int kind = 0; kind < 2; ++kind)
      check(kind ? "best positive" : "best", data, i, found[kind] == best[kind] ? 0 : std::fabs(found[kind] - best[kind]), limit);
    for (int n = 0; n < 2; ++n) check(n ? "ties" : "rank", data, i, counts[n] < surely[n] || counts[n] > perhaps[n], 0);
    if (best[0] == NONE) continue;
    const bool there = where >= 0 && where < c.n && data.kind[data.at(i, where)] == 0;
    check("where", data, i, there ? best[0] - data.t[data.at(i, where)] : 1e30, 2 * limit);
  }
}

// Random coefficients, the weights of every pair, and the sums of the sizes of their terms.
struct Weighed {
  std::vector<float> vectors[2];
  std::vector<double> w, size;
  double most_base = 0;
  float center = 0.25f;
  Weights weights{};

  Weighed(const Data& data, std::mt19937& random) : w(data.t.size()), size(data.t.size()) {
    const Case& c = data.c;
    std::normal_distribution<float> normal;
    const int fields = c.in_tile ? 5 : 2;
    for (int side = 0; side < 2; ++side) {
      if (!(side ? c.of_columns : c.of_rows)) continue;
      const int rows = side ? c.n : c.m, padded = up_to(rows, 128);
      vectors[side].assign(fields * padded, POISON);
      for (int i = 0; i < rows; ++i) {
        const Truth truth(data, i, side);
        for (int kind = 0; kind < fields / 2; ++kind) {
          const double base = truth.lse[kind] == NONE ? 0 : truth.lse[kind] + random() % 4;
          vectors[side][2 * kind * padded + i] = static_cast<float>(base);
          vectors[side][(2 * kind + 1) * padded + i] = normal(random);
          most_base = std::max(most_base, std::fabs(base));
        }
        if (c.in_tile) vectors[side][4 * padded + i] = normal(random) / 4;
      }
    }
    if (c.symmetric && c.of_rows && c.of_columns) vectors[1] = vectors[0];
    for (int i = 0; i < c.m; ++i)
      for (int j = 0; j < c.n; ++j) {
        const int kind = data.kind[data.at(i, j)];
        if (kind == 2) continue;
        for (int side = 0; side < 2; ++side) {
          const auto& of = vectors[side];
          if (of.empty()) continue;
          const int row = side ? j : i, padded = static_cast<int>(of.size()) / fields;
          double terms[2] = {of[(2 * kind + 1) * padded + row] * std::exp2(data.t[data.at(i, j)] - of[2 * kind * padded + row]), 0};
          if (kind) terms[1] = of[4 * padded + row];
          for (double term : terms) w[data.at(i, j)] += term, size[data.at(i, j)] += std::fabs(term);
        }
      }
    weights = {c.of_rows ? vectors[0].data() : nullptr, c.of_columns ? vectors[1].data() : nullptr, &center, c.of_rows, c.of_columns};
  }

  // Limit of the error of a weight, relative to `size`: exponentials, 2^-base inside of the factors, sums of up to four terms.
  double error(const Data& data) const { return data.error_of_exp(most_base) + 24 * U; }
  // The same of its rounding to float16. Below 2^-14 that error is absolute, up to 2^-25.
  static double error_of_half(const Data& data) { return data.c.parts == 2 ? 16 * U : 1.0 / 2048; }
  static constexpr double SUBNORMAL = 1.0 / (1 << 25);

  // The sum of w (t - center) over `columns` columns from `first` of row i, and the limit of its error. 2^(t - base) below 2^-126 is 0.
  void moment(const Data& data, int i, int first, int columns, double& sum, double& limit) const {
    const double relative = error(data) + (columns + 8) * U * 2;
    sum = limit = 0;
    for (int j = first; j < std::min(first + columns, data.c.n); ++j) {
      const double from = data.t[data.at(i, j)] - center;
      sum += w[data.at(i, j)] * from;
      limit +=
          size[data.at(i, j)] * (std::fabs(from) * relative + data.error_of_t() + 2 * U * data.most_t) + std::ldexp(std::fabs(from), -120);
    }
  }
};

void backward_rows(const Data& data, std::mt19937& random) {
  const Case& c = data.c;
  const Weighed of(data, random);
  const Grid grid = grid_of(ceil_div(c.n, tile(c).columns), c.splits);
  std::vector<float> dx(static_cast<size_t>(c.splits) * data.p.row_padded * c.depth, POISON);
  const bool wants_moment = random() % 4;
  std::vector<float> moment(wants_moment ? c.splits * c.m : 0, POISON);
  backward_rows(data.p, grid, of.weights, {dx.data(), wants_moment ? moment.data() : nullptr}, c.family, nullptr);
  // Products are added 16 at a time, and each sum is cut off. In two parts there are three products.
  const double relative = of.error(data) + Weighed::error_of_half(data) + (c.n / 16 + 2) * 3 * 2 * U;
  std::vector<double> sum(c.depth), limit(c.depth);
  for (int i = 0; i < c.m; ++i) {
    std::fill(sum.begin(), sum.end(), 0);
    std::fill(limit.begin(), limit.end(), 0);
    for (int j = 0; j < c.n; ++j) {
      const double w = of.w[data.at(i, j)] * data.b[j], allowed = of.size[data.at(i, j)] * data.b[j] * relative + Weighed::SUBNORMAL;
      const float* y = &data.y_real[static_cast<size_t>(j) * c.depth];
      for (int l = 0; l < c.depth; ++l) sum[l] += w * y[l], limit[l] += allowed * std::fabs(y[l]);
    }
    double worst = 0;
    for (int l = 0; l < c.depth; ++l) {
      double found = 0;
      for (int split = 0; split < c.splits; ++split) found += dx[(static_cast<size_t>(split) * data.p.row_padded + i) * c.depth + l];
      const double error = std::fabs(found - sum[l]) / (limit[l] + 1e-30);
      if (!(error <= worst)) worst = error;
    }
    check("dx, times what is allowed", data, i, worst, 1);
    if (!wants_moment) continue;
    double wanted, allowed, found = 0;
    of.moment(data, i, 0, c.n, wanted, allowed);
    for (int split = 0; split < c.splits; ++split) found += moment[split * c.m + i];
    check("moment", data, i, std::fabs(found - wanted), allowed);
  }
}

void weights_block(const Data& data, std::mt19937& random) {
  const Case& c = data.c;
  const Weighed of(data, random);
  const TileShape size = tile(c);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  const int rows = data.p.row_padded / size.rows, columns = data.p.column_padded / size.columns;
  Block block{};
  const int row = below(rows), column = below(columns);
  block.row0 = row * size.rows;
  block.column0 = column * size.columns;
  block.down = 1 + below(rows - row);
  block.across = 1 + below(columns - column);
  const int height = block.down * size.rows, width = block.across * size.columns;
  block.pitch = std::max(height, width) + (below(2) ? 0 : 128);
  const size_t square = static_cast<size_t>(block.pitch) * block.pitch;
  std::vector<uint16_t> out[2];
  const int wanted = 1 + below(3);  // for_rows, for_columns, or both
  for (int side = 0; side < 2; ++side)
    if (wanted >> side & 1) out[side].assign(c.parts * square, POISON_HALF);
  std::vector<float> moment(below(4) ? block.across * block.pitch : 0, POISON);
  block.for_rows = out[0].empty() ? nullptr : out[0].data();
  block.for_columns = out[1].empty() ? nullptr : out[1].data();
  block.moment = moment.empty() ? nullptr : moment.data();
  weights_block(data.p, of.weights, block, nullptr);
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < block.pitch && !out[side].empty(); ++i) {
      double worst = 0;
      for (int j = 0; j < block.pitch; ++j) {
        const uint16_t* halves = &out[side][static_cast<size_t>(i) * block.pitch + j];
        const int row = block.row0 + i, column = block.column0 + j;
        double error = 0;
        if (i >= height || j >= width) {
          for (int part = 0; part < c.parts; ++part) error += halves[part * square] != POISON_HALF;
        } else {
          double found = 0, exact = 0, allowed = 0;
          for (int part = 0; part < c.parts; ++part) found += emulator::half_to_float(halves[part * square]);
          // Outside of the matrix, and for an excluded pair, the weight is 0.
          if (row < c.m && column < c.n && data.kind[data.at(row, column)] != 2) {
            const double factor = side ? data.a[row] : data.b[column];
            exact = of.w[data.at(row, column)] * factor;
            allowed = of.size[data.at(row, column)] * factor * (of.error(data) + Weighed::error_of_half(data)) + Weighed::SUBNORMAL;
          }
          error = found == exact ? 0 : std::fabs(found - exact) / (allowed + 1e-30);
        }
        if (!(error <= worst)) worst = error;
      }
      check(side ? "for_columns, times what is allowed" : "for_rows, times what is allowed", data, i, worst, 1);
    }
  for (int across = 0; across < block.across && !moment.empty(); ++across)
    for (int i = 0; i < block.pitch; ++i) {
      const float found = moment[across * block.pitch + i];
      if (i >= height) {
        check("moment behind the block", data, i, !std::isnan(found), 0);
        continue;
      }
      double exact = 0, allowed = 0;
      if (block.row0 + i < c.m) of.moment(data, block.row0 + i, block.column0 + across * size.columns, size.columns, exact, allowed);
      check("moment", data, i, std::fabs(found - exact), allowed);
    }
}

void run(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  emulator::seed(seed);
  const Data data(c, random);
  ++cases;
  switch (c.kernel) {
    case Kernel::FORWARD_ROWS:
      return forward_rows(data, random() % 4);
    case Kernel::FORWARD_BOTH:
      return forward_both(data);
    case Kernel::RETRIEVAL:
      return retrieval(data, random);
    case Kernel::BACKWARD_ROWS:
      return backward_rows(data, random);
    case Kernel::WEIGHTS_BLOCK:
      return weights_block(data, random);
  }
}

// A random problem of this form with at most `most` products.
Case random_case(Kernel kernel, int family, bool content, int depth, int parts, unsigned n, int64_t most, std::mt19937& random) {
  static constexpr int sizes[] = {1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 100, 127, 128, 129, 130, 191, 193, 257, 300};
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  // Two in three have more than one tile.
  const auto size = [&] { return sizes[n % 3 ? 9 + below(10) : below(19)]; };
  Case c{};
  c.kernel = kernel;
  c.family = family;
  c.content = content;
  c.depth = depth;
  c.parts = parts;
  c.symmetric = kernel != Kernel::RETRIEVAL && n >= 3;
  do {
    c.m = size();
    c.n = c.symmetric ? c.m : size();
  } while (static_cast<int64_t>(up_to(c.m, 64)) * up_to(c.n, 64) * depth * parts > most);
  // Where the keys are the queries, the pair of a row with itself would drown all others.
  c.own = below(c.symmetric ? 4 : 2) ? 0 : NOWHERE;
  c.up = c.down = NOWHERE;
  if (below(3)) c.up = c.symmetric ? below(c.n + 1) : below(c.m + c.n) - c.m;
  if (c.up != NOWHERE && (c.symmetric || below(3) == 0)) c.down = -c.up;
  while (content && !c.excludes && !c.in_tile) {
    c.labels = below(2);
    c.masked = below(4) == 0;
    c.excludes = below(2);
    // Without ids the positives in the tiles are those of the diagonals.
    c.in_tile = c.labels || c.masked || below(2);
  }
  // Largest logits inside and outside of the range of the unshifted kernels.
  const float reaches[] = {8.0f, 39.0f, 45.0f, 200.0f};
  c.reach = reaches[kernel == Kernel::FORWARD_BOTH ? (n == 5 ? 2 : below(2)) : below(4)];
  const int sides = kernel == Kernel::WEIGHTS_BLOCK ? 1 + 2 * below(2) : 1 + static_cast<int>(n % 3);
  c.of_rows = sides & 1;
  c.of_columns = sides & 2;
  c.splits = 1 + below(3);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "", family = argc > 2 ? argv[2] : "";
  struct Form {
    int depth, parts;
  };
  const Form forms[] = {{64, 1}, {128, 1}, {256, 1}, {64, 2}, {128, 2}, {192, 1}, {320, 1}, {192, 2}, {256, 2}};
  for (int of = 0; of < 5; ++of)
    for (int kind = MMA; kind <= WGMMA; ++kind)
      for (const auto& [depth, parts] : forms)
        for (int content = of == 2; content < 2; ++content) {
          const auto k = static_cast<Kernel>(of);
          const bool is = (kernel.empty() || kernel == NAMES[of]) && (family.empty() || family == (kind ? "wgmma" : "mma"));
          // Only forms that exist: tile_of names the family, and rows that do not fit have no backward_rows.
          const bool there = kind == MMA || tile_of(k, content, parts, depth, 90).family == WGMMA;
          if (!is || !there || (k == Kernel::BACKWARD_ROWS && depth * parts > 256) ||
              (depth == 192 && parts == 1 && k == Kernel::BACKWARD_ROWS))
            continue;
          for (unsigned n = 0; n < 6; ++n) {
            const unsigned seed = (((of * 2 + kind) * 512 + depth) * 2 + parts) * 64 + content * 32 + n;
            std::mt19937 random(seed);
            run(random_case(k, kind, content, depth, parts, n, 8 << 20, random), seed);
          }
          // More tiles than stages, and an odd and an even number of blocks round the circle.
          if (depth == 64 && parts == 1)
            for (unsigned n = 0; n < (kind == WGMMA && k != Kernel::FORWARD_BOTH ? 6 : 2); ++n) {
              std::mt19937 random(n * 2 + content);
              Case c = random_case(k, kind, content, depth, parts, n, 1 << 20, random);
              c.symmetric = k == Kernel::FORWARD_BOTH;
              c.splits = 1;
              c.n = n % 2 ? 700 : 600;
              if (c.symmetric) c.m = c.n, c.down = c.up == NOWHERE ? NOWHERE : -c.up;
              run(c, n);
            }
        }
  std::printf("%d cases, %d wrong\n", cases, failures);
  return failures != 0;
}
