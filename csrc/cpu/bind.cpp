// The operators of the library: their schemas, checks of every argument, and torch's threads. fastnce/backends/cpu.py prepares the
// arguments, and makes the tensors that results are written into. No other unit includes torch.
#include <limits>

#include "../tensors.h"
#include "problem.h"

namespace {

using fastnce::Metrics;
using fastnce::Problem;
using fastnce::Sums;
using fastnce::Wanted;
using fastnce::Weights;

template <class T>
T* data(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastnce: ", name, " must be on the CPU");
  return contiguous<T>(tensor, count, name);
}

template <class T>
T* data(const Optional& tensor, int64_t count, const char* name) {
  return tensor ? data<T>(*tensor, count, name) : nullptr;
}

fastnce::Pool threads() {
  const int count = static_cast<int>(torch::stable::get_num_threads());
  return {count, [](int64_t n, const std::function<void(int64_t, int64_t, int)>& body) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              uint32_t thread = 0;
              TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
              body(begin, end, static_cast<int>(thread));
            });
          }};
}

// flags: two_sided, unshifted, in_tile, exclude_self
Problem problem(const Tensor& x, const Optional& y, int64_t depth, double bias, const Integers& flags, std::optional<int64_t> offset,
                const Optional& q_label, const Optional& k_label, const Optional& q_exclude, const Optional& k_exclude,
                const Optional& mask) {
  STD_TORCH_CHECK(flags.size() == 4, "fastnce: flags has ", flags.size(), " entries, not 4");
  STD_TORCH_CHECK(x.dim() == 2 && (!y || (y->dim() == 2 && y->size(1) == x.size(1))), "fastnce: x and y must be matrices of equal width");
  const int64_t m = x.size(0), n = y ? y->size(0) : m, pitch = x.size(1);
  STD_TORCH_CHECK(pitch % fastnce::PITCH == 0 && depth >= 0 && depth <= pitch, "fastnce: rows of ", pitch, " floats cannot hold ", depth,
                  " columns");
  Problem p{};
  p.m = m;
  p.n = n;
  p.d = depth;
  p.pitch = pitch;
  p.x = data<float>(x, m * pitch, "x");
  p.y = y ? data<float>(*y, n * pitch, "y") : p.x;
  p.bias = static_cast<float>(bias);
  p.symmetric = !y;
  p.two_sided = flags[0];
  p.unshifted = flags[1];
  p.in_tile = flags[2];
  STD_TORCH_CHECK(!(p.symmetric && mask), "fastnce: a mask need not be its own mirror image: give y");
  STD_TORCH_CHECK(!(p.symmetric && (p.two_sided || k_label || k_exclude)), "fastnce: without y there is no second side");
  p.rules.exclude_self = flags[3];
  const int64_t farthest = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(!offset || (-farthest <= *offset && *offset <= farthest), "fastnce: offset is ", offset.value_or(0),
                  ", farther than any two rows are apart");
  p.rules.has_offset = offset.has_value();
  p.rules.offset = offset.value_or(0);
  // has_value() and not a pointer says whether ids were given: an empty tensor has no data.
  const auto one_sided = [&](const Optional& q, const Optional& k) { return !p.symmetric && q.has_value() != k.has_value(); };
  STD_TORCH_CHECK(!one_sided(q_label, k_label) && !one_sided(q_exclude, k_exclude), "fastnce: ids of one side only");
  p.rules.q_label = data<int64_t>(q_label, m, "q_label");
  p.rules.k_label = p.symmetric ? p.rules.q_label : data<int64_t>(k_label, n, "k_label");
  p.rules.q_exclude = data<int64_t>(q_exclude, m, "q_exclude");
  p.rules.k_exclude = p.symmetric ? p.rules.q_exclude : data<int64_t>(k_exclude, n, "k_exclude");
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) > 0 && mask->size(1) > 0, "fastnce: mask must be a matrix");
    p.rules.mask_rows = mask->size(0);
    p.rules.mask_columns = mask->size(1);
    p.rules.mask = data<bool>(*mask, p.rules.mask_rows * p.rules.mask_columns, "mask");
  }
  return p;
}

int64_t rows_of(const Problem& p, int side) { return side ? p.n : p.m; }
int sides_of(const Problem& p) { return p.two_sided ? 2 : 1; }

// The data of a tensor in a list; null for an empty one, which stands for none.
template <class T>
T* some(const Tensor& tensor, int64_t count, const char* name) {
  return tensor.numel() == 0 ? nullptr : data<T>(tensor, count, name);
}

void best_positives(const Tensor& x, const Optional& y, int64_t depth, double bias, const Integers& flags, std::optional<int64_t> offset,
                    const Optional& q_label, const Optional& k_label, const Optional& q_exclude, const Optional& k_exclude,
                    const Optional& mask, const Tensors& best) {
  const Problem p = problem(x, y, depth, bias, flags, offset, q_label, k_label, q_exclude, k_exclude, mask);
  STD_TORCH_CHECK(best.size() == static_cast<size_t>(sides_of(p)), "fastnce: best has ", best.size(), " tensors, not one a side");
  float* sides[2] = {};
  for (int side = 0; side < sides_of(p); ++side) sides[side] = data<float>(best[side], rows_of(p, side), "best");
  Memory().reads(x, y, q_label, k_label, q_exclude, k_exclude, mask).writes(best).check();
  if (p.m > 0 && p.n > 0) fastnce::best_level().best_positives(p, sides, threads());
}

void forward(const Tensor& x, const Optional& y, int64_t depth, double bias, const Integers& flags, std::optional<int64_t> offset,
             const Optional& q_label, const Optional& k_label, const Optional& q_exclude, const Optional& k_exclude, const Optional& mask,
             const Tensors& sums) {
  const Problem p = problem(x, y, depth, bias, flags, offset, q_label, k_label, q_exclude, k_exclude, mask);
  constexpr size_t each = 12;
  STD_TORCH_CHECK(sums.size() == each * sides_of(p), "fastnce: sums has ", sums.size(), " tensors, not ", each, " a side");
  Sums sides[2] = {};
  for (int side = 0; side < sides_of(p); ++side) {
    const Tensor* at = &sums[side * each];
    const int64_t rows = rows_of(p, side);
    Sums& s = sides[side];
    s.negative = data<double>(at[0], rows, "negative");
    s.top_negative = some<float>(at[1], rows, "top_negative");
    s.positive = some<double>(at[2], rows, "positive");
    s.top_positive = some<float>(at[3], rows, "top_positive");
    s.pos = data<double>(at[4], rows, "pos");
    s.n_pos = data<int64_t>(at[5], rows, "n_pos");
    Metrics& found = s.metrics;
    found.low = some<float>(at[6], rows, "low");
    found.high = some<float>(at[7], rows, "high");
    found.rank = some<int64_t>(at[8], rows, "rank");
    found.ties = some<int64_t>(at[9], rows, "ties");
    found.hardest_t = some<float>(at[10], rows, "hardest_t");
    found.hardest = some<int64_t>(at[11], rows, "hardest");
  }
  Memory().reads(x, y, q_label, k_label, q_exclude, k_exclude, mask).writes(sums).check();
  if (p.m == 0 || p.n == 0) return;  // without rows all tensors are empty, and would look as if they were not given
  for (int side = 0; side < sides_of(p); ++side) {
    const Sums& s = sides[side];
    const Metrics& found = s.metrics;
    STD_TORCH_CHECK(p.unshifted || (s.top_negative && (!p.in_tile || s.top_positive)), "fastnce: a running maximum needs its tensor");
    STD_TORCH_CHECK(!p.in_tile || s.positive, "fastnce: positives by content need their tensor");
    const bool all = found.low && found.high && found.rank && found.ties && found.hardest_t && found.hardest;
    const bool none = !found.low && !found.high && !found.rank && !found.ties && !found.hardest_t && !found.hardest;
    STD_TORCH_CHECK(all || none, "fastnce: metrics need all of their tensors");
    STD_TORCH_CHECK(!found.rank == !sides[0].metrics.rank, "fastnce: metrics must be of both sides or of none");
  }
  fastnce::best_level().forward(p, sides, threads());
}

void backward(const Tensor& x, const Optional& y, int64_t depth, double bias, const Integers& flags, std::optional<int64_t> offset,
              const Optional& q_label, const Optional& k_label, const Optional& q_exclude, const Optional& k_exclude, const Optional& mask,
              const Tensors& weights, double center, const Optional& dx, const Optional& dy, const Optional& moment) {
  const Problem p = problem(x, y, depth, bias, flags, offset, q_label, k_label, q_exclude, k_exclude, mask);
  constexpr size_t each = 5;
  STD_TORCH_CHECK(!(p.symmetric && dy), "fastnce: without y there is no dy");
  STD_TORCH_CHECK(weights.size() == each * sides_of(p), "fastnce: weights has ", weights.size(), " tensors, not ", each, " a side");
  Weights sides[2] = {};
  for (int side = 0; side < sides_of(p); ++side) {
    const Tensor* at = &weights[side * each];
    const int64_t rows = rows_of(p, side);
    sides[side] = {data<float>(at[0], rows, "negative"), data<float>(at[1], rows, "base_negative"), data<float>(at[2], rows, "positive"),
                   data<float>(at[3], rows, "base_positive"), data<float>(at[4], rows, "mean")};
  }
  Wanted wanted{};
  wanted.dx = data<float>(dx, p.m * p.pitch, "dx");
  wanted.dy = p.symmetric ? wanted.dx : data<float>(dy, p.n * p.pitch, "dy");
  wanted.moment = data<double>(moment, p.m, "moment");
  wanted.center = static_cast<float>(center);
  Memory().reads(x, y, q_label, k_label, q_exclude, k_exclude, mask, weights).writes(dx, dy, moment).check();
  if (p.m > 0 && p.n > 0) fastnce::best_level().backward(p, sides, wanted, threads());
}

std::string level() { return fastnce::best_level().name; }

}  // namespace

STABLE_TORCH_LIBRARY(fastnce_cpu, m) {
  m.def(
      "best_positives(Tensor x, Tensor? y, int depth, float bias, int[] flags, int? offset, Tensor? q_label, Tensor? k_label, Tensor? "
      "q_exclude, "
      "Tensor? k_exclude, Tensor? mask, Tensor(a!)[] best) -> ()");
  m.def(
      "forward(Tensor x, Tensor? y, int depth, float bias, int[] flags, int? offset, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, "
      "Tensor? k_exclude, Tensor? mask, Tensor(a!)[] sums) -> ()");
  m.def(
      "backward(Tensor x, Tensor? y, int depth, float bias, int[] flags, int? offset, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, "
      "Tensor? k_exclude, Tensor? mask, Tensor[] weights, float center, Tensor(a!)? dx, Tensor(b!)? dy, Tensor(c!)? moment) -> ()");
  m.def("level() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastnce_cpu, CPU, m) {
  m.impl("best_positives", TORCH_BOX(&best_positives));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastnce_cpu, CompositeExplicitAutograd, m) { m.impl("level", TORCH_BOX(&level)); }
