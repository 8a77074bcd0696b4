// A program that runs the CPU kernels without torch, to be built with -fsanitize=address,undefined: random problems of every shape and
// rule, on each level of the processor, with one thread and three, against the definition in double. Every wrong number is a line, and
// makes the exit status 1.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "problem.h"
#include "walk.h"

using namespace fastnce;

namespace {

constexpr double NONE = -INFINITY;

Pool pool(int threads) {
  return {threads, [threads](int64_t count, const std::function<void(int64_t, int64_t, int)>& body) {
            std::vector<std::thread> running;
            for (int t = 0; t < threads; ++t) running.emplace_back([&, t] { body(count * t / threads, count * (t + 1) / threads, t); });
            for (auto& one : running) one.join();
          }};
}

struct Case {
  int64_t m, n, d;
  bool symmetric, two_sided, exclude_self, has_offset, labels, excludes, masked, unshifted, metrics;
  int64_t offset;
  float reach;  // of the logits
};

// The tensors of a problem. Vectors have no element to spare: the sanitizer sees a read behind their end.
struct Data {
  Case c;
  std::vector<float> x, y;
  std::vector<int64_t> q_label, k_label, q_exclude, k_exclude;
  std::vector<char> mask;
  Problem p{};

  Data(const Case& made, std::mt19937& random) : c(made) {
    std::normal_distribution<float> normal;
    const int64_t pitch = (c.d + PITCH - 1) / PITCH * PITCH;
    const auto rows = [&](int64_t count) {
      std::vector<float> out(count * pitch, 0.0f);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t l = 0; l < c.d; ++l) out[i * pitch + l] = normal(random) * std::sqrt(c.reach / c.d);
      return out;
    };
    const auto ids = [&](int64_t count, int values) {
      std::vector<int64_t> out(count);
      for (auto& id : out) id = static_cast<int64_t>(random() % values) - 1;
      return out;
    };
    x = rows(c.m);
    if (!c.symmetric) y = rows(c.n);
    p.m = c.m;
    p.n = c.n;
    p.d = c.d;
    p.pitch = pitch;
    p.x = x.data();
    p.y = c.symmetric ? x.data() : y.data();
    p.symmetric = c.symmetric;
    p.two_sided = c.two_sided;
    p.bias = c.unshifted ? 1.5f : -20.0f;
    p.unshifted = c.unshifted;
    p.in_tile = true;
    p.rules.exclude_self = c.exclude_self;
    p.rules.has_offset = c.has_offset;
    p.rules.offset = c.offset;
    if (c.labels) {
      q_label = ids(c.m, 9);
      k_label = c.symmetric ? q_label : ids(c.n, 9);
      p.rules.q_label = q_label.data();
      p.rules.k_label = k_label.data();
    }
    if (c.excludes) {
      q_exclude = ids(c.m, 7);
      k_exclude = c.symmetric ? q_exclude : ids(c.n, 7);
      p.rules.q_exclude = q_exclude.data();
      p.rules.k_exclude = k_exclude.data();
    }
    if (c.masked) {
      p.rules.mask_rows = (c.m + 1) / 2;
      p.rules.mask_columns = (c.n + 2) / 3;
      mask.resize(p.rules.mask_rows * p.rules.mask_columns);
      for (auto& bit : mask) bit = random() % 5 == 0;
      p.rules.mask = reinterpret_cast<const bool*>(mask.data());
    }
  }

  double logit(int64_t i, int64_t j) const {
    double t = 0;
    for (int64_t l = 0; l < p.d; ++l) t += static_cast<double>(p.x[i * p.pitch + l]) * p.y[j * p.pitch + l];
    return t;
  }

  // The rules in the order of fastnce/pairs.py: 0 negative, 1 positive, 2 excluded.
  int kind(int64_t i, int64_t j) const {
    const Rules& r = p.rules;
    if (r.exclude_self && i == j) return 2;
    if (r.has_offset && (j - i == r.offset || (p.symmetric && i - j == r.offset))) return 1;
    if (r.q_exclude && r.q_exclude[i] >= 0 && r.q_exclude[i] == r.k_exclude[j]) return 2;
    if (r.q_label && r.q_label[i] >= 0 && r.q_label[i] == r.k_label[j]) return 1;
    return r.mask && r.mask[i % r.mask_rows * r.mask_columns + j % r.mask_columns] ? 1 : 0;
  }
};

struct Side {
  std::vector<double> negative, positive, pos;
  std::vector<float> top_negative, top_positive, pos_max, low, high, hardest_t;
  std::vector<int64_t> n_pos, rank, ties, hardest;

  explicit Side(int64_t rows)
      : negative(rows),
        positive(rows),
        pos(rows),
        top_negative(rows, -INFINITY),
        top_positive(rows, -INFINITY),
        pos_max(rows, -INFINITY),
        low(rows),
        high(rows),
        hardest_t(rows, -INFINITY),
        n_pos(rows),
        rank(rows),
        ties(rows),
        hardest(rows, -1) {}

  Sums sums(bool metrics) {
    Sums s{negative.data(), top_negative.data(), positive.data(), top_positive.data(), pos.data(), n_pos.data(), {}};
    if (metrics) s.metrics = {low.data(), high.data(), rank.data(), ties.data(), hardest_t.data(), hardest.data()};
    return s;
  }

  // Bounds from pos_max. Nothing ties with a row without a positive.
  void compare(float band) {
    for (size_t i = 0; i < pos_max.size(); ++i) {
      low[i] = pos_max[i] == -INFINITY ? INFINITY : pos_max[i] - band;
      high[i] = pos_max[i] + band;
    }
  }
};

struct Coefficients {
  std::vector<float> negative, base_negative, positive, base_positive, mean;

  Coefficients(int64_t rows, bool unshifted, const Side& of, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (auto* v : {&negative, &base_negative, &positive, &base_positive, &mean}) v->resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      negative[i] = normal(random);
      positive[i] = normal(random);
      mean[i] = normal(random);
      const auto base = [&](double sum, float top) { return sum > 0 ? static_cast<float>(std::log2(sum) + (unshifted ? 0 : top)) : 0.0f; };
      base_negative[i] = base(of.negative[i], of.top_negative[i]);
      base_positive[i] = base(of.positive[i], of.top_positive[i]);
      if (unshifted) {
        negative[i] *= std::exp2(-base_negative[i]);
        positive[i] *= std::exp2(-base_positive[i]);
      }
    }
  }

  Weights weights() const { return {negative.data(), base_negative.data(), positive.data(), base_positive.data(), mean.data()}; }

  // The weight of a pair of this kind, by the definition.
  double of(int kind, int64_t i, double t, bool unshifted) const {
    const auto term = [&](float c, float base) { return c * std::exp2(t - (unshifted ? 0.0 : base)); };
    return kind == 0 ? term(negative[i], base_negative[i]) : kind == 1 ? term(positive[i], base_positive[i]) + mean[i] : 0.0;
  }
};

int failures = 0;

void check(const char* what, const Case& c, const char* level, double error, double limit) {
  if (error <= limit) return;
  ++failures;
  std::printf(
      "%s %s: error %g, limit %g: %ld x %ld x %ld symmetric %d two_sided %d self %d offset %d %ld labels %d excludes %d mask %d unshifted "
      "%d\n",
      level, what, error, limit, static_cast<long>(c.m), static_cast<long>(c.n), static_cast<long>(c.d), c.symmetric, c.two_sided,
      c.exclude_self, c.has_offset, static_cast<long>(c.offset), c.labels, c.excludes, c.masked, c.unshifted);
}

double log2_of(double sum, float top, bool unshifted) { return std::log2(sum) + (unshifted || sum == 0 ? 0.0 : top); }

void run(const Case& c, const Level& level, unsigned seed) {
  std::mt19937 random(seed);
  const Data data(c, random);
  const Problem& p = data.p;
  const int sides = c.two_sided ? 2 : 1;
  std::vector<Side> found{Side(p.m), Side(p.n)}, threaded = found;
  Sums sums[2] = {found[0].sums(c.metrics), found[1].sums(c.metrics)},
       again[2] = {threaded[0].sums(c.metrics), threaded[1].sums(c.metrics)};
  const double limit = 1e-5 * std::max(1.0f, c.reach);
  for (auto* of : {&found, &threaded}) {
    float* const best[2] = {(*of)[0].pos_max.data(), (*of)[1].pos_max.data()};
    if (c.metrics) level.best_positives(p, best, pool(of == &found ? 1 : 3));
    for (Side& side : *of) side.compare(static_cast<float>(3 * limit));
  }
  level.forward(p, sums, pool(1));
  level.forward(p, again, pool(3));

  for (int side = 0; side < sides; ++side) {
    const int64_t rows = side ? p.n : p.m, others = side ? p.m : p.n;
    const Side& s = found[side];
    check("bits by threads", c, level.name,
          s.negative == threaded[side].negative && s.positive == threaded[side].positive && s.pos == threaded[side].pos &&
                  s.hardest == threaded[side].hardest && s.rank == threaded[side].rank && s.ties == threaded[side].ties
              ? 0
              : 1,
          0);
    for (int64_t i = 0; i < rows; ++i) {
      double sum[2] = {0, 0}, top[2] = {NONE, NONE}, pos = 0;
      int64_t count = 0;
      for (int pass = 0; pass < 2; ++pass)
        for (int64_t j = 0; j < others; ++j) {
          const int kind = side ? data.kind(j, i) : data.kind(i, j);
          if (kind == 2) continue;
          const double t = side ? data.logit(j, i) : data.logit(i, j);
          if (pass == 0) {
            top[kind] = std::max(top[kind], t);
            if (kind == 1) pos += t, ++count;
          } else {
            sum[kind] += std::exp2(t - top[kind]);
          }
        }
      const double wanted[2] = {std::log2(sum[0]) + top[0] + p.bias, std::log2(sum[1]) + top[1] + p.bias};
      const double got[2] = {log2_of(s.negative[i], s.top_negative[i], c.unshifted),
                             log2_of(s.positive[i], s.top_positive[i], c.unshifted)};
      for (int kind = 0; kind < 2; ++kind) {
        const bool none = top[kind] == NONE;
        check(kind ? "lse_pos" : "lse_neg", c, level.name,
              none ? (s.negative[i] == 0 || kind ? 0 : 1) : std::fabs(got[kind] - wanted[kind]), limit);
      }
      check("pos", c, level.name, std::fabs(s.pos[i] - pos), limit * std::max<int64_t>(1, count));
      check("n_pos", c, level.name, std::fabs(static_cast<double>(s.n_pos[i] - count)), 0);
      if (c.metrics && top[0] != NONE) {
        const int64_t hardest = s.hardest[i];
        check("hardest", c, level.name, hardest < 0 ? 1 : top[0] - (side ? data.logit(hardest, i) : data.logit(i, hardest)), limit);
        // The band is 3 limit to either side, and t and the best positive are each off by less than limit.
        int64_t surely[2] = {}, perhaps[2] = {};
        for (int64_t j = 0; j < others; ++j)
          if ((side ? data.kind(j, i) : data.kind(i, j)) == 0) {
            const double above = (side ? data.logit(j, i) : data.logit(i, j)) - top[1];
            surely[0] += above > 5 * limit;
            perhaps[0] += above > limit;
            surely[1] += std::fabs(above) < limit;
            perhaps[1] += std::fabs(above) < 5 * limit;
          }
        check("rank", c, level.name, s.rank[i] < surely[0] || s.rank[i] > perhaps[0] ? 1 : 0, 0);
        check("ties", c, level.name, s.ties[i] < surely[1] || s.ties[i] > perhaps[1] ? 1 : 0, 0);
        check("pos_max", c, level.name, s.pos_max[i] == top[1] ? 0 : std::fabs(s.pos_max[i] - top[1]), limit);
      }
    }
  }

  std::vector<Coefficients> of;
  for (int side = 0; side < 2; ++side) of.emplace_back(side ? p.n : p.m, c.unshifted, found[side], random);
  const Weights weights[2] = {of[0].weights(), of[1].weights()};
  std::vector<float> dx(p.m * p.pitch), dy(p.n * p.pitch), dx3 = dx, dy3 = dy;
  std::vector<double> moment(p.m), moment3 = moment;
  const float center = 0.25f;
  level.backward(p, weights, {dx.data(), c.symmetric ? dx.data() : dy.data(), moment.data(), center}, pool(1));
  level.backward(p, weights, {dx3.data(), c.symmetric ? dx3.data() : dy3.data(), moment3.data(), center}, pool(3));
  check("gradient's bits by threads", c, level.name, dx == dx3 && dy == dy3 && moment == moment3 ? 0 : 1, 0);

  std::vector<double> x_exact(p.m * p.pitch), y_exact(p.n * p.pitch);
  double exact = 0, sum = 0, size = 0;
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t j = 0; j < p.n; ++j) {
      const int kind = data.kind(i, j);
      const double t = data.logit(i, j);
      double w = of[0].of(kind, i, t + p.bias, c.unshifted);
      if (c.two_sided) w += of[1].of(kind, j, t + p.bias, c.unshifted);
      exact += w * (t - center);
      size += std::fabs(w * (t - center));
      for (int64_t l = 0; l < p.d; ++l) {
        x_exact[i * p.pitch + l] += w * p.y[j * p.pitch + l];
        (c.symmetric ? x_exact : y_exact)[j * p.pitch + l] += w * p.x[i * p.pitch + l];
      }
    }
  for (double row : moment) sum += row;
  check("moment", c, level.name, std::fabs(sum - exact), 1e-4 * std::max(1.0f, c.reach) * (size + 1e-30));
  const auto relative = [](const std::vector<float>& a, const std::vector<double>& b) {
    double error = 0, norm = 1e-30;
    for (size_t e = 0; e < a.size(); ++e) error += (a[e] - b[e]) * (a[e] - b[e]), norm += b[e] * b[e];
    return std::sqrt(error / norm);
  };
  const double of_sums = 3e-6 * std::max(1.0f, c.reach);
  check("dx", c, level.name, relative(dx, x_exact), of_sums);
  if (!c.symmetric) check("dy", c, level.name, relative(dy, y_exact), of_sums);
}

// A walk visits every block once. No two blocks of a round add to the same sums of a row, or of a column. No place is without a block. Of
// the places that two threads share, neither thread gets more than one a round beyond its half.
void walk(int64_t rows, int64_t columns, bool symmetric, bool apart) {
  const Walk order = Walk::of(rows, columns, symmetric, apart);
  std::vector<int> visits(rows * columns);
  int64_t most = 0, all = 0;
  bool right = apart || order.groups == 1;
  for (int64_t round = 0; round < order.rounds(); ++round) {
    const int64_t places = order.places(round);
    std::vector<char> row(order.groups * rows), column(order.groups * columns);
    const bool by_rows = rows <= columns;
    right = right && places > 0;
    for (int64_t place = 0; place < places; ++place) {
      const Block at = order.at(round, place);
      if (at.row < 0 || at.row >= rows || at.column < 0 || at.column >= columns || at.group < 0 || at.group >= order.groups ||
          at.row > (symmetric ? at.column : at.row)) {
        right = false;
        continue;
      }
      ++visits[at.row * columns + at.column];
      // All groups have the same sums of the longer side.
      char& in_row = row[(by_rows ? at.group : 0) * rows + at.row];
      char& in_column = column[(by_rows ? 0 : at.group) * columns + at.column];
      right = right && !in_row && !in_column;
      in_row = in_column = 1;
      if (symmetric) {
        right = right && (at.row == at.column || (!row[at.column] && !column[at.row]));
        row[at.column] = column[at.row] = 1;
      }
    }
    most += (places + 1) / 2;
    all += places;
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) right = right && visits[i * columns + j] == (symmetric && j < i ? 0 : 1);
  // Two threads share the work, except in the smallest problems: of three places in a round, one thread has two.
  const bool enough = apart && (symmetric ? rows >= 8 : rows * columns >= 8);
  if (enough) right = right && 3 * most <= 2 * all;
  if (right) return;
  ++failures;
  std::printf("walk over %ld x %ld blocks, symmetric %d, apart %d: %ld of %ld to one of two threads\n", static_cast<long>(rows),
              static_cast<long>(columns), symmetric, apart, static_cast<long>(most), static_cast<long>(all));
}

// A nan, whatever its bits, makes the sums and gradients of its row nan. One column has 2^t = 1 for all other rows.
void nans(const Level& level, bool unshifted, uint32_t bits) {
  Case c{20, 70, 16, false, true, false, false, false, false, false, unshifted, false, 0, 8.0f};
  std::mt19937 random(3);
  Data data(c, random);
  float nan;
  std::memcpy(&nan, &bits, sizeof nan);
  data.y[33 * data.p.pitch + 5] = nan;
  std::vector<Side> found{Side(20), Side(70)};
  const Sums sums[2] = {found[0].sums(false), found[1].sums(false)};
  level.forward(data.p, sums, pool(1));
  bool right = true;
  for (int side = 0; side < 2; ++side)
    for (size_t i = 0; i < found[side].negative.size(); ++i) right = right && std::isnan(found[side].negative[i]) == (side == 0 || i == 33);
  const std::vector<float> ones(70, 1.0f), zeros(70, 0.0f);
  const Weights weights[2] = {{ones.data(), zeros.data(), ones.data(), zeros.data(), zeros.data()},
                              {ones.data(), zeros.data(), ones.data(), zeros.data(), zeros.data()}};
  std::vector<float> dx(data.x.size()), dy(data.y.size());
  std::vector<double> moment(20);
  level.backward(data.p, weights, {dx.data(), dy.data(), moment.data(), 0.0f}, pool(1));
  for (int64_t i = 0; i < 20; ++i) right = right && std::isnan(dx[i * data.p.pitch]) && std::isnan(moment[i]);
  for (int64_t j = 0; j < 70; ++j) right = right && std::isnan(dy[j * data.p.pitch]) == (j == 33);
  if (right) return;
  ++failures;
  std::printf("%s: nan %#x becomes a number, unshifted %d\n", level.name, bits, unshifted);
}

}  // namespace

int main() {
  const int64_t sizes[] = {1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 130, 193};
  const int64_t widths[] = {1, 3, 16, 17, 40, 64, 70};
  int cases = 0;
  for (const Level* level : levels())
    for (unsigned seed = 0; seed < 160; ++seed, ++cases) {
      std::mt19937 random(seed);
      const auto coin = [&] { return random() % 2 == 0; };
      Case c{};
      c.symmetric = coin();
      c.m = sizes[random() % std::size(sizes)];
      c.n = c.symmetric ? c.m : sizes[random() % std::size(sizes)];
      c.d = widths[random() % std::size(widths)];
      c.two_sided = !c.symmetric && coin();
      c.exclude_self = coin();
      c.has_offset = coin();
      c.offset = static_cast<int64_t>(random() % (c.n + 4)) - 2;
      c.labels = coin();
      c.excludes = coin();
      c.masked = !c.symmetric && random() % 4 == 0;  // a mask need not be its own mirror image: keys are then given
      c.unshifted = coin();
      c.metrics = coin();
      c.reach = c.unshifted ? 8.0f : 200.0f;
      run(c, *level, seed);
    }
  for (int64_t rows = 1; rows <= 24; ++rows) {
    walk(rows, rows, true, true);
    for (int64_t columns : {1, 2, 3, 5, 8, 15, 16, 17, 22, 24, 31, 33, 86, 171})
      for (bool apart : {true, false}) {
        walk(rows, columns, false, apart);
        walk(columns, rows, false, apart);
        cases += 2;
      }
  }
  for (const Level* level : levels())
    for (bool unshifted : {true, false})
      for (uint32_t bits :
           {0x7fc00000u, 0x7fffffffu, 0x7fc00001u, 0x7f800001u, 0x7fbfffffu, 0xffc00000u, 0xffffffffu, 0xff800001u, 0x7fc00180u}) {
        nans(*level, unshifted, bits);
        ++cases;
      }
  // Sizes across the edges of blocks of 64, 192 and 384 rows.
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{385, 385}, {1537, 70}, {70, 1537}, {130, 1200}}) {
    Case c{m, n, 20, m == n, m != n, true, true, true, false, false, true, false, m / 2, 8.0f};
    run(c, best_level(), 7);
    ++cases;
  }
  std::printf("%d cases, %d wrong\n", cases, failures);
  return failures != 0;
}
