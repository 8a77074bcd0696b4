// The operators of the library: their schemas, and checks of every argument. fastnce/backends/_gpu prepares the arguments, and makes the
// tensors that results are written into. No other unit includes torch.
#include "asked.h"
#include "rows.h"
#include "vectors.h"

namespace {

using kernels::ElementType;
using kernels::RawRows;
using kernels::Weights;

// ---------------------------------------------------------------- the library

Kernel kernel_named(const std::string& name) {
  if (name == "forward_rows") return Kernel::FORWARD_ROWS;
  if (name == "forward_both") return Kernel::FORWARD_BOTH;
  if (name == "retrieval") return Kernel::RETRIEVAL;
  if (name == "backward_rows") return Kernel::BACKWARD_ROWS;
  STD_TORCH_CHECK(name == "weights_block", "fastnce: there is no kernel ", name);
  return Kernel::WEIGHTS_BLOCK;
}

Integers tile(const std::string& kernel, const std::string& rules, int64_t parts, int64_t depth, int64_t architecture) {
  const bool content = rules == "ids" || rules == "mask";
  STD_TORCH_CHECK(content || rules == "index", "fastnce: rules must be index, ids or mask, got ", rules);
  const TileShape size = kernels::tile_of(kernel_named(kernel), content, count_of(parts, 1, 3, "parts"),
                                          count_of(depth, 0, MOST_ROWS, "depth"), count_of(architecture, 80, 1000, "architecture"));
  return {size.rows, size.columns, size.family};
}

// Whether the library has code for this GPU, which its driver takes; -1: whether it is the tests' build for the CPU.
bool runs_on(int64_t device) {
#ifdef FASTNCE_EMULATED
  return device == -1;
#else
  if (device < 0) return false;
  const OnDevice there(static_cast<int>(device));
  return there.status() == cudaSuccess && kernels::has_code();
#endif
}

// ---------------------------------------------------------------- tiles

void forward_rows(PROBLEM_PARAMETERS, bool always, int64_t splits, int64_t per_split, const Tensor& sums, const Optional& count) {
  const Call call(x);
  const Asked of = asked(call, Kernel::FORWARD_ROWS, PROBLEM);
  const Problem& p = of.problem;
  const Grid grid = grid_of(Kernel::FORWARD_ROWS, of, splits, per_split);
  const int64_t each = splits * p.rules.rows;
  const kernels::RowSums out{call.data<float>(sums, (p.rules.in_tile ? 5 : 2) * each, "sums"), call.data<int>(count, each, "count"),
                             always};
  STD_TORCH_CHECK(!p.rules.in_tile || count, "fastnce: positives in the tiles must have a count");
  Memory().reads(PROBLEM_TENSORS).writes(sums, count).check();
  if (p.rules.rows > 0) call.run([&](Stream stream) { kernels::forward_rows(p, grid, out, of.family, stream); });
}

void forward_both(PROBLEM_PARAMETERS, bool symmetric, int64_t splits, int64_t per_split, const Tensor& row_sum, const Optional& row_count,
                  const Tensor& column_sum, const Optional& column_count) {
  const Call call(x);
  const Asked of = asked(call, Kernel::FORWARD_BOTH, PROBLEM);
  const Problem& p = of.problem;
  const Grid grid = grid_of(Kernel::FORWARD_BOTH, of, splits, per_split, symmetric);
  const int64_t rows = p.rules.rows, columns = p.rules.columns, fields = p.rules.in_tile ? 3 : 1;
  STD_TORCH_CHECK(!symmetric || rows == columns, "fastnce: a symmetric problem must have as many columns as rows");
  const kernels::BothSums out{call.data<float>(row_sum, fields * rows, "row_sum"), call.data<int>(row_count, rows, "row_count"),
                              call.data<float>(column_sum, fields * columns, "column_sum"),
                              call.data<int>(column_count, columns, "column_count"), symmetric};
  STD_TORCH_CHECK(!p.rules.in_tile || (row_count && column_count), "fastnce: positives in the tiles must have their counts");
  // Of a symmetric problem rows and columns may have the same sums: all additions are atomic.
  const bool shared = symmetric && out.row == out.column && out.row_count == out.column_count;
  Memory memory;
  memory.reads(PROBLEM_TENSORS).writes(row_sum, row_count);
  if (!shared) memory.writes(column_sum, column_count);
  memory.check();
  if (rows > 0 && columns > 0) call.run([&](Stream stream) { kernels::forward_both(p, grid, out, of.family, stream); });
}

void retrieval(PROBLEM_PARAMETERS, const Tensor& bounds, int64_t splits, int64_t per_split, const Tensor& largest, const Tensor& counts) {
  const Call call(x);
  const Asked of = asked(call, Kernel::RETRIEVAL, PROBLEM);
  const Problem& p = of.problem;
  const Grid grid = grid_of(Kernel::RETRIEVAL, of, splits, per_split);
  const int64_t each = splits * p.rules.rows;
  const kernels::Retrieval out{call.data<float>(bounds, int64_t{2} * p.rules.rows, "bounds"),
                               call.data<float>(largest, 2 * each, "largest"), call.data<int>(counts, 3 * each, "counts")};
  Memory().reads(PROBLEM_TENSORS, bounds).writes(largest, counts).check();
  if (p.rules.rows > 0) call.run([&](Stream stream) { kernels::retrieval(p, grid, out, stream); });
}

// The vectors of a side that has no weights are not read, and may have any size.
Weights weights_of(const Call& call, const Problem& p, const Tensor& row, const Tensor& column, const Tensor& center, bool of_rows,
                   bool of_columns) {
  const int64_t fields = p.rules.in_tile ? 5 : 2;
  Weights w{};
  w.row = of_rows ? call.data<float>(row, fields * p.row_padded, "row", WIDE) : nullptr;
  w.column = of_columns ? call.data<float>(column, fields * p.column_padded, "column", WIDE) : nullptr;
  w.center = call.data<float>(center, 1, "center");
  w.of_rows = of_rows;
  w.of_columns = of_columns;
  return w;
}

void backward_rows(PROBLEM_PARAMETERS, const Tensor& row, const Tensor& column, const Tensor& center, bool of_rows, bool of_columns,
                   int64_t splits, int64_t per_split, const Tensor& dx, const Optional& moment) {
  const Call call(x);
  const Asked of = asked(call, Kernel::BACKWARD_ROWS, PROBLEM);
  const Problem& p = of.problem;
  const Grid grid = grid_of(Kernel::BACKWARD_ROWS, of, splits, per_split);
  STD_TORCH_CHECK(of_rows || of_columns, "fastnce: the weights must be of rows, of columns, or of both");
  const Weights weights = weights_of(call, p, row, column, center, of_rows, of_columns);
  const kernels::RowGradient out{call.data<float>(dx, splits * p.row_padded * p.depth, "dx", WIDE),
                                 call.data<float>(moment, splits * p.rules.rows, "moment")};
  Memory().reads(PROBLEM_TENSORS, row, column, center).writes(dx, moment).check();
  if (p.rules.rows > 0) call.run([&](Stream stream) { kernels::backward_rows(p, grid, weights, out, of.family, stream); });
}

void weights_block(PROBLEM_PARAMETERS, const Tensor& row, const Tensor& column, const Tensor& center, bool of_columns, int64_t row0,
                   int64_t column0, int64_t down, int64_t across, int64_t pitch, const Optional& for_rows, const Optional& for_columns,
                   const Optional& moment) {
  const Call call(x);
  const Problem p = asked(call, Kernel::WEIGHTS_BLOCK, PROBLEM).problem;
  const Weights weights = weights_of(call, p, row, column, center, true, of_columns);
  kernels::Block out{};
  out.row0 = count_of(row0, 0, MOST_ROWS, "row0");
  out.column0 = count_of(column0, 0, MOST_ROWS, "column0");
  out.down = count_of(down, 0, MOST_ROWS, "down");
  out.across = count_of(across, 0, MOST_ROWS, "across");
  out.pitch = count_of(pitch, 0, MOST_ROWS, "pitch");
  const TileShape tile = tile_of(Kernel::WEIGHTS_BLOCK, p, kernels::MMA);
  const int64_t height = down * tile.rows, width = across * tile.columns;
  STD_TORCH_CHECK(row0 + height <= p.row_padded && column0 + width <= p.column_padded && height <= pitch && width <= pitch,
                  "fastnce: ", down, " x ", across, " tiles of ", tile.rows, " x ", tile.columns, " from (", row0, ", ", column0,
                  ") on leave a block of ", pitch, " or operands of ", p.row_padded, " and ", p.column_padded, " rows");
  out.for_rows = call.data<uint16_t>(for_rows, p.parts * pitch * pitch, "for_rows", WIDE);
  out.for_columns = call.data<uint16_t>(for_columns, p.parts * pitch * pitch, "for_columns", WIDE);
  out.moment = call.data<float>(moment, across * pitch, "moment");
  Memory().reads(PROBLEM_TENSORS, row, column, center).writes(for_rows, for_columns, moment).check();
  if (down > 0 && across > 0) call.run([&](Stream stream) { kernels::weights_block(p, weights, out, stream); });
}

// ---------------------------------------------------------------- single rows

ElementType element_type_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Half) return ElementType::HALF;
  if (type == ScalarType::BFloat16) return ElementType::BFLOAT16;
  STD_TORCH_CHECK(type == ScalarType::Float, "fastnce: ", name, " must be float32, float16 or bfloat16, got ", name_of(type));
  return ElementType::FLOAT;
}

// The alignment of a tensor that need not be contiguous.
void check_element(const Tensor& tensor, const char* name) {
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % tensor.element_size() == 0;
  STD_TORCH_CHECK(aligned, "fastnce: ", name, " must be aligned to its elements");
}

RawRows raw_rows(const Call& call, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, "fastnce: ", name, " must be a matrix");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "fastnce: ", name, " must have neighbours of a row next to each other");
  call.check(x, name);
  check_element(x, name);
  return {x.data_ptr(), x.stride(0), count_of(x.size(0), 0, MOST_ROWS, name), count_of(x.size(1), 1, MOST_ROWS, name),
          element_type_of(x, name)};
}

// Both sides of a product.
void check_pair(const RawRows& x, const RawRows& y) {
  STD_TORCH_CHECK(x.columns == y.columns && x.type == y.type, "fastnce: x and y must have the same width and dtype");
}

void prepare(const Tensor& x, const Tensor& operand, const Tensor& factor, const Tensor& inverse_norm, bool normalize) {
  const Call call(x);
  const RawRows raw = raw_rows(call, x, "x");
  kernels::Operand out{};
  out.padded = padded(operand, "operand");
  out.parts = static_cast<int>(operand.size(1));
  out.depth = static_cast<int>(operand.size(2));
  STD_TORCH_CHECK(raw.rows <= out.padded && raw.columns <= out.depth, "fastnce: an operand of ", out.padded, " x ", out.depth,
                  " cannot hold ", raw.rows, " x ", raw.columns);
  out.tiles = call.data<uint16_t>(operand, operand.numel(), "operand", WIDE);
  out.factor = call.data<float>(factor, out.padded, "factor");
  out.inverse_norm = call.data<float>(inverse_norm, raw.rows, "inverse_norm");
  Memory().reads(x).writes(operand, factor, inverse_norm).check();
  if (out.padded > 0) call.run([&](Stream stream) { kernels::prepare(raw, out, normalize, stream); });
}

void aligned(const Tensor& x, const Tensor& y, const Tensor& r_x, const Tensor& r_y, const Tensor& scale, int64_t first_row,
             int64_t first_column, const Tensor& t) {
  const Call call(x);
  const RawRows left = raw_rows(call, x, "x"), right = raw_rows(call, y, "y");
  check_pair(left, right);
  kernels::Aligned of{};
  of.r_x = call.data<float>(r_x, left.rows, "r_x");
  of.r_y = call.data<float>(r_y, right.rows, "r_y");
  of.scale = call.data<float>(scale, 1, "scale");
  of.pairs = count_of(t.numel(), 0, MOST_ROWS, "t");
  of.first_row = count_of(first_row, 0, int64_t{left.rows} - of.pairs + 1, "first_row");
  of.first_column = count_of(first_column, 0, int64_t{right.rows} - of.pairs + 1, "first_column");
  of.t = call.data<float>(t, of.pairs, "t");
  Memory().reads(x, y, r_x, r_y, scale).writes(t).check();
  if (of.pairs > 0) call.run([&](Stream stream) { kernels::aligned(left, right, of, stream); });
}

void finish(const Tensor& dx, const Tensor& x, const Tensor& y, const Tensor& r_x, const Tensor& r_y, const Tensor& pair,
            const Tensor& scale, const Tensor& lift, int64_t up, int64_t down, bool normalize, const Tensor& out) {
  const Call call(x);
  const RawRows left = raw_rows(call, x, "x"), right = raw_rows(call, y, "y"), result = raw_rows(call, out, "out");
  check_pair(left, right);
  STD_TORCH_CHECK(result.rows == left.rows && result.columns == left.columns && result.type == left.type && out.is_contiguous(),
                  "fastnce: out must be contiguous and like x");
  STD_TORCH_CHECK(dx.dim() == 3 && dx.size(1) >= left.rows && dx.size(2) >= left.columns,
                  "fastnce: dx must be (splits, rows.., columns..)");
  STD_TORCH_CHECK(dx.scalar_type() == ScalarType::Float && (dx.stride(2) == 1 || dx.size(2) == 1),
                  "fastnce: dx must be float32 with neighbours of a row next to each other");
  call.check(dx, "dx");
  check_element(dx, "dx");
  Memory().reads(dx, x, y, r_x, r_y, pair, scale, lift).writes(out).check();
  kernels::Finish of{};
  of.dx = static_cast<const float*>(dx.data_ptr());
  of.dx_split = dx.stride(0);
  of.dx_row = dx.stride(1);
  of.splits = count_of(dx.size(0), 1, MOST_ROWS, "splits");
  of.r_x = call.data<float>(r_x, left.rows, "r_x");
  of.r_y = call.data<float>(r_y, right.rows, "r_y");
  of.pair = call.data<float>(pair, left.rows, "pair");
  of.scale = call.data<float>(scale, 1, "scale");
  of.lift = call.data<float>(lift, 1, "lift");
  of.up = diagonal(up, "up");
  of.down = diagonal(down, "down");
  of.normalize = normalize;
  of.out = out.data_ptr();
  if (left.rows > 0) call.run([&](Stream stream) { kernels::finish(left, right, of, stream); });
}

// ---------------------------------------------------------------- vectors

void statistics(const Tensor& sums, const Optional& count, const Optional& unshifted, const Optional& unshifted_count,
                const Optional& pairs, const Integers& ends, const Optional& bias, const Tensor& lse_neg, const Tensor& lse_pos,
                const Tensor& pos, const Tensor& n_pos, const Tensor& own_neg, const Tensor& own_pos) {
  const Call call(sums);
  STD_TORCH_CHECK(sums.dim() == 3 && (sums.size(0) == 2 || sums.size(0) == 5), "fastnce: sums must be (2 or 5, splits, rows)");
  kernels::Statistics s{};
  s.in_tile = sums.size(0) == 5;
  s.splits = count_of(sums.size(1), 1, MOST_ROWS, "splits");
  s.rows = count_of(sums.size(2), 0, MOST_ROWS, "rows");
  s.sums = call.data<float>(sums, sums.numel(), "sums");
  s.count = call.data<int>(count, int64_t{s.splits} * s.rows, "count");
  s.unshifted = call.data<float>(unshifted, (s.in_tile ? 3 : 1) * int64_t{s.rows}, "unshifted");
  s.unshifted_count = call.data<int>(unshifted_count, s.rows, "unshifted_count");
  STD_TORCH_CHECK(
      s.in_tile == count.has_value() && s.in_tile != pairs.has_value() && (s.in_tile && unshifted) == unshifted_count.has_value(),
      "fastnce: positives must be counted in the tiles, or given as pairs");
  STD_TORCH_CHECK(ends.size() == 1 || ends.size() == 2, "fastnce: ends must have 1 or 2 entries, got ", ends.size());
  s.pair_count = pairs ? count_of(pairs->numel(), 0, int64_t{s.rows} + 1, "pairs") : 0;
  s.pairs = call.data<float>(pairs, s.pair_count, "pairs");
  s.ends = s.pair_count ? static_cast<int>(ends.size()) : 0;
  for (int n = 0; n < s.ends; ++n) s.end[n] = count_of(ends[n], 0, int64_t{s.rows} - s.pair_count + 1, "ends");
  s.bias = call.data<float>(bias, 1, "bias");
  s.lse_neg = call.data<double>(lse_neg, s.rows, "lse_neg");
  s.lse_pos = call.data<double>(lse_pos, s.rows, "lse_pos");
  s.pos = call.data<double>(pos, s.rows, "pos");
  s.n_pos = call.data<int64_t>(n_pos, s.rows, "n_pos");
  s.own_neg = call.data<double>(own_neg, s.rows, "own_neg");
  s.own_pos = call.data<double>(own_pos, s.rows, "own_pos");
  Memory().reads(sums, count, unshifted, unshifted_count, pairs, bias).writes(lse_neg, lse_pos, pos, n_pos, own_neg, own_pos).check();
  if (s.rows > 0) call.run([&](Stream stream) { kernels::statistics(s, stream); });
}

void coefficients(const Tensors& grads, const Tensors& stats, const Tensors& factors, const Optional& bias, const Optional& pair_t,
                  const Integers& pair_ends, bool in_tile, bool symmetric, const Tensors& vectors, const Optional& pair_weights,
                  const Tensor& scalars) {
  const Call call(scalars);
  kernels::Contributions c{};
  c.sides = count_of(static_cast<int64_t>(vectors.size()), 1, symmetric ? 2 : 3, "sides");
  const size_t sides = vectors.size();
  STD_TORCH_CHECK(grads.size() == 3 * sides && stats.size() == 6 * sides && factors.size() == 2, "fastnce: ", sides, " sides must have ",
                  3 * sides, " grads, ", 6 * sides, " stats and 2 factors, got ", grads.size(), ", ", stats.size(), " and ",
                  factors.size());
  for (int n = 0; n < 2; ++n) {
    c.factors[n] = count_of(factors[n].numel(), 0, MOST_ROWS, "factors");
    c.factor[n] = call.data<float>(factors[n], c.factors[n], "factors");
  }
  for (int n = 0; n < c.sides; ++n) {
    kernels::SideOf& s = c.side[n];
    const Tensor *grad = &grads[3 * n], *stat = &stats[6 * n];
    s.padded = c.factors[n];
    s.rows = count_of(grad->numel(), 0, int64_t{s.padded} + 1, "grads");
    s.dlse_neg = call.data<double>(grad[0], s.rows, "dlse_neg");
    s.dlse_pos = call.data<double>(grad[1], s.rows, "dlse_pos");
    s.dpos = call.data<double>(grad[2], s.rows, "dpos");
    s.lse_neg = call.data<double>(stat[0], s.rows, "lse_neg");
    s.lse_pos = call.data<double>(stat[1], s.rows, "lse_pos");
    s.pos = call.data<double>(stat[2], s.rows, "pos");
    s.n_pos = call.data<int64_t>(stat[3], s.rows, "n_pos");
    s.own_neg = call.data<double>(stat[4], s.rows, "own_neg");
    s.own_pos = call.data<double>(stat[5], s.rows, "own_pos");
    s.vectors = call.data<float>(vectors[n], (in_tile ? 5 : 2) * int64_t{s.padded}, "vectors", WIDE);
  }
  c.bias = call.data<float>(bias, 1, "bias");
  STD_TORCH_CHECK(pair_t.has_value() == pair_weights.has_value(), "fastnce: pairs must have both t and weights");
  STD_TORCH_CHECK(pair_ends.size() == 2, "fastnce: pair_ends must have 2 entries, got ", pair_ends.size());
  c.pairs = pair_t ? count_of(pair_t->numel(), 0, MOST_ROWS, "pair_t") : 0;
  c.pair_t = call.data<double>(pair_t, c.pairs, "pair_t");
  c.pair_weights = call.data<float>(pair_weights, c.pairs, "pair_weights");
  if (c.pairs > 0) {
    c.first[0] = count_of(pair_ends[0], 0, int64_t{c.side[0].rows} - c.pairs + 1, "pair_ends[0]");
    const bool both = symmetric || c.sides == 2;
    c.first[1] = count_of(pair_ends[1], 0, both ? int64_t{c.side[c.sides - 1].rows} - c.pairs + 1 : MOST_ROWS, "pair_ends[1]");
  }
  c.in_tile = in_tile;
  c.symmetric = symmetric;
  c.scalars = call.data<double>(scalars, 4, "scalars");
  Memory().reads(grads, stats, factors, bias, pair_t).writes(vectors, pair_weights, scalars).check();
  Optional scratch;
  if (const int64_t doubles = kernels::scratch_of(c)) scratch = torch::stable::new_empty(scalars, {doubles});
  call.run([&](Stream stream) { kernels::coefficients(c, scratch ? static_cast<double*>(scratch->data_ptr()) : nullptr, stream); });
}

void scale_gradient(const Tensor& scalars, const Tensors& about, double divide, const Tensor& scale, const Tensor& dscale,
                    const Tensor& dbias) {
  const Call call(scalars);
  kernels::ScaleGradient g{};
  g.scalars = call.data<double>(scalars, 4, "scalars");
  g.parts = count_of(static_cast<int64_t>(about.size()), 0, kernels::MOST_PARTS + 1, "parts of about");
  for (int n = 0; n < g.parts; ++n) {
    g.count[n] = about[n].numel();
    g.about[n] = call.data<float>(about[n], g.count[n], "about");
  }
  g.divide = divide;
  g.scale = call.data<float>(scale, 1, "scale");
  g.dscale = call.data<float>(dscale, 1, "dscale");
  g.dbias = call.data<float>(dbias, 1, "dbias");
  Memory().reads(scalars, about, scale).writes(dscale, dbias).check();
  call.run([&](Stream stream) { kernels::scale_gradient(g, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY(fastnce_cuda, m) {
  m.def("tile(str kernel, str rules, int parts, int depth, int architecture) -> int[]");
  m.def("runs_on(int device) -> bool");
  m.def("prepare(Tensor x, Tensor(a!) operand, Tensor(b!) factor, Tensor(c!) inverse_norm, bool normalize) -> ()");
  m.def("aligned(Tensor x, Tensor y, Tensor r_x, Tensor r_y, Tensor scale, int first_row, int first_column, Tensor(a!) t) -> ()");
  m.def(
      "finish(Tensor dx, Tensor x, Tensor y, Tensor r_x, Tensor r_y, Tensor pair, Tensor scale, Tensor lift, int up, int down, "
      "bool normalize, Tensor(a!) out) -> ()");
  m.def("forward_rows(" PROBLEM_SCHEMA ", bool always, int splits, int per_split, Tensor(a!) sums, Tensor(b!)? count) -> ()");
  m.def("forward_both(" PROBLEM_SCHEMA
        ", bool symmetric, int splits, int per_split, Tensor(a!) row_sum, Tensor(b!)? row_count, "
        "Tensor(c!) column_sum, Tensor(d!)? column_count) -> ()");
  m.def("retrieval(" PROBLEM_SCHEMA ", Tensor bounds, int splits, int per_split, Tensor(a!) largest, Tensor(b!) counts) -> ()");
  m.def("backward_rows(" PROBLEM_SCHEMA
        ", Tensor row, Tensor column, Tensor center, bool of_rows, bool of_columns, int splits, "
        "int per_split, Tensor(a!) dx, Tensor(b!)? moment) -> ()");
  m.def("weights_block(" PROBLEM_SCHEMA
        ", Tensor row, Tensor column, Tensor center, bool of_columns, int row0, int column0, int down, "
        "int across, int pitch, Tensor(a!)? for_rows, Tensor(b!)? for_columns, Tensor(c!)? moment) -> ()");
  m.def(
      "statistics(Tensor sums, Tensor? count, Tensor? unshifted, Tensor? unshifted_count, Tensor? pairs, int[] ends, Tensor? bias, "
      "Tensor(a!) lse_neg, Tensor(b!) lse_pos, Tensor(c!) pos, Tensor(d!) n_pos, Tensor(e!) own_neg, Tensor(f!) own_pos) -> ()");
  m.def(
      "coefficients(Tensor[] grads, Tensor[] stats, Tensor[] factors, Tensor? bias, Tensor? pair_t, int[] pair_ends, bool in_tile, "
      "bool symmetric, Tensor(a!)[] vectors, Tensor(b!)? pair_weights, Tensor(c!) scalars) -> ()");
  m.def("scale_gradient(Tensor scalars, Tensor[] about, float divide, Tensor scale, Tensor(a!) dscale, Tensor(b!) dbias) -> ()");
}

#ifdef FASTNCE_EMULATED
#define SERVED CPU
#else
#define SERVED CUDA
#endif
// The indirection is for the name behind SERVED.
#define IMPLEMENT(device) STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, device, m)

IMPLEMENT(SERVED) {
  m.impl("prepare", TORCH_BOX(&prepare));
  m.impl("aligned", TORCH_BOX(&aligned));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("forward_rows", TORCH_BOX(&forward_rows));
  m.impl("forward_both", TORCH_BOX(&forward_both));
  m.impl("retrieval", TORCH_BOX(&retrieval));
  m.impl("backward_rows", TORCH_BOX(&backward_rows));
  m.impl("weights_block", TORCH_BOX(&weights_block));
  m.impl("statistics", TORCH_BOX(&statistics));
  m.impl("coefficients", TORCH_BOX(&coefficients));
  m.impl("scale_gradient", TORCH_BOX(&scale_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(fastnce_cuda, CompositeExplicitAutograd, m) {
  m.impl("tile", TORCH_BOX(&tile));
  m.impl("runs_on", TORCH_BOX(&runs_on));
}
