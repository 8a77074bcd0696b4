// The first arguments of every operator over tiles: their schema, and the Problem that they make once they are checked.
#pragma once

#include "call.h"
#include "index.h"
#include "wgmma_forms.h"

namespace {

// The kernels, whose names the operators have too.
namespace kernels = fastnce::cuda;
using kernels::Grid;
using kernels::Kernel;
using kernels::Problem;
using kernels::TileShape;

#define PROBLEM_SCHEMA                                                                                                                \
  "Tensor x, Tensor y, Tensor a, Tensor b, Tensor scale, Tensor bound, Tensor? q_label, Tensor? k_label, Tensor? q_exclude, Tensor? " \
  "k_exclude, Tensor? mask, int[] sizes"
#define PROBLEM_PARAMETERS                                                                                                               \
  const Tensor &x, const Tensor &y, const Tensor &a, const Tensor &b, const Tensor &scale, const Tensor &bound, const Optional &q_label, \
      const Optional &k_label, const Optional &q_exclude, const Optional &k_exclude, const Optional &mask, const Integers &sizes
#define PROBLEM_TENSORS x, y, a, b, scale, bound, q_label, k_label, q_exclude, k_exclude, mask
#define PROBLEM PROBLEM_TENSORS, sizes

// Operands are padded to a multiple of every tile's rows.
constexpr int64_t PADDED = 128;

int padded(const Tensor& operand, const char* name) {
  STD_TORCH_CHECK(operand.dim() == 3, "fastnce: ", name, " must be (padded rows, parts, depth)");
  const int rows = count_of(operand.size(0), 0, MOST_ROWS, name);
  STD_TORCH_CHECK(rows % PADDED == 0, "fastnce: ", name, " must have a multiple of ", PADDED, " rows, got ", rows);
  STD_TORCH_CHECK(operand.size(1) == 1 || operand.size(1) == 2, "fastnce: ", name, " must have 1 or 2 parts, got ", operand.size(1));
  const int64_t depth = operand.size(2);
  STD_TORCH_CHECK(depth > 0 && depth % kernels::GROUP == 0 && depth < MOST_ROWS, "fastnce: ", name, " must have a multiple of ",
                  kernels::GROUP, " columns, got ", depth);
  return rows;
}

// A problem whose arguments are checked, and the family of kernels that it is for.
struct Asked {
  Problem problem;
  int family;
};

Asked asked(const Call& call, Kernel kernel, PROBLEM_PARAMETERS) {
  STD_TORCH_CHECK(sizes.size() == 11, "fastnce: sizes must have 11 entries, got ", sizes.size());
  Problem p{};
  p.row_padded = padded(x, "operand x");
  p.column_padded = padded(y, "operand y");
  STD_TORCH_CHECK(x.size(1) == y.size(1) && x.size(2) == y.size(2), "fastnce: operands must have the same form, got ", x.size(1), " x ",
                  x.size(2), " and ", y.size(1), " x ", y.size(2));
  p.parts = static_cast<int>(x.size(1));
  p.depth = static_cast<int>(x.size(2));
  p.x = call.data<uint16_t>(x, x.numel(), "operand x", WIDE);
  p.y = call.data<uint16_t>(y, y.numel(), "operand y", WIDE);
  p.a = call.data<float>(a, p.row_padded, "factor a", WIDE);
  p.b = call.data<float>(b, p.column_padded, "factor b", WIDE);
  p.scale = call.data<float>(scale, 1, "scale");
  p.bound = call.data<float>(bound, 1, "bound");
  kernels::Rules& r = p.rules;
  r.q_label = call.data<int>(q_label, p.row_padded, "q_label", WIDE);
  r.k_label = call.data<int>(k_label, p.column_padded, "k_label", WIDE);
  r.q_exclude = call.data<int>(q_exclude, p.row_padded, "q_exclude", WIDE);
  r.k_exclude = call.data<int>(k_exclude, p.column_padded, "k_exclude", WIDE);
  // Whether ids were given is not a matter of their data: those of no rows have none.
  const bool both = q_label.has_value() == k_label.has_value() && q_exclude.has_value() == k_exclude.has_value();
  STD_TORCH_CHECK(both, "fastnce: ids must be given for both sides or for none");
  r.mask_rows = count_of(sizes[0], 1, MOST_ROWS, "mask_rows");
  r.mask_columns = count_of(sizes[1], 1, MOST_ROWS, "mask_columns");
  r.mask_row = sizes[2];
  r.mask_column = sizes[3];
  if (mask) {
    const ScalarType type = mask->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Byte, "fastnce: mask must be bool or uint8, got ", name_of(type));
    call.check(*mask, "mask");
    STD_TORCH_CHECK(mask->dim() == 2, "fastnce: mask must be a matrix");
    // As it is, or seen from its columns.
    const auto is = [&](int rows, int columns) {
      return sizes[0] == mask->size(rows) && sizes[1] == mask->size(columns) && sizes[2] == mask->stride(rows) &&
             sizes[3] == mask->stride(columns);
    };
    STD_TORCH_CHECK(is(0, 1) || is(1, 0), "fastnce: sizes must hold the shape and the strides of mask");
    r.mask = static_cast<const uint8_t*>(mask->data_ptr());
  }
  r.rows = count_of(sizes[4], 0, int64_t{p.row_padded} + 1, "rows");
  r.columns = count_of(sizes[5], 0, int64_t{p.column_padded} + 1, "columns");
  r.own = diagonal(sizes[6], "own");
  r.up = diagonal(sizes[7], "up");
  r.down = diagonal(sizes[8], "down");
  r.in_tile = count_of(sizes[9], 0, 2, "in_tile");
  const int family = count_of(sizes[10], 0, 2, "family");
  STD_TORCH_CHECK(family == kernels::MMA || kernels::wgmma_serves(kernel, p.parts, p.depth), "fastnce: family ", family,
                  " has no such kernel for operands of ", p.parts, " x ", p.depth);
  return {p, family};
}

// The tile that a kernel takes for this problem.
TileShape tile_of(Kernel kernel, const Problem& p, int family) {
  return kernels::tile_of(kernel, p.rules.by_content(), p.parts, p.depth, family == kernels::WGMMA ? 90 : 80);
}

// symmetric: half of the tiles are visited, see index.h.
Grid grid_of(Kernel kernel, const Asked& of, int64_t splits, int64_t per_split, bool symmetric = false) {
  const Problem& p = of.problem;
  const Grid grid{count_of(splits, 1, MOST_ROWS, "splits"), count_of(per_split, p.rules.columns > 0, MOST_ROWS, "per_split")};
  const int across = kernels::ceil_div(p.rules.columns, tile_of(kernel, p, of.family).columns), steps = symmetric ? across / 2 + 1 : across;
  // A split without a tile computes nothing, and a million of them take their time.
  STD_TORCH_CHECK(splits <= steps || splits == 1, "fastnce: ", splits, " splits are more than ", steps, " tiles");
  STD_TORCH_CHECK(splits * per_split >= steps || across == 0, "fastnce: ", splits, " splits of ", per_split, " tiles do not cover ", steps);
  return grid;
}

}  // namespace
