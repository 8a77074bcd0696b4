// The forms in which the mma.sync kernels are compiled, and the choice among them.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace fastnce::cuda {

// Whether rows of the operand fit into shared memory. weights_block reads all rows in chunks.
constexpr bool fits(Kernel kernel, int parts, int depth) {
  return kernel != Kernel::WEIGHTS_BLOCK && depth * parts <= 256 && (depth == 64 || depth == 128 || depth == 256);
}

// Strips of 16 rows for each warp: two where registers and shared memory are enough, because they share the reads of y~.
constexpr int strips(Kernel kernel, bool content, int parts, int depth) {
  const bool one = content || !(kernel == Kernel::FORWARD_ROWS || kernel == Kernel::FORWARD_BOTH);
  return one || (depth ? depth * parts > 128 : parts > 1) ? 1 : 2;
}

// Columns of a tile. 64, or 32 for the longest rows: two stages of 64 of them would leave room for one block on a multiprocessor, which on
// some GPUs has 99 KiB. Weights with ids have half: coefficients and the sums of gradients take the registers.
constexpr int columns(Kernel kernel, bool content, int parts, int depth) {
  const int all = depth * parts <= 128 ? 64 : 32;
  const bool weighs = kernel == Kernel::BACKWARD_ROWS || kernel == Kernel::WEIGHTS_BLOCK;
  return weighs && content ? all / 2 : all;
}

template <Kernel KERNEL, bool CONTENT, int DEPTH, int PARTS>
using Form = Shape<DEPTH, PARTS, strips(KERNEL, CONTENT, PARTS, DEPTH), columns(KERNEL, CONTENT, PARTS, DEPTH)>;

// run(Form{}, content) for the form of this problem.
template <Kernel KERNEL, bool CONTENT, class Run>
void with_form(const Problem& p, const Run& run) {
  if (!fits(KERNEL, p.parts, p.depth)) {
    if constexpr (KERNEL != Kernel::BACKWARD_ROWS) {
      p.parts == 1 ? run(Form<KERNEL, CONTENT, 0, 1>{}) : run(Form<KERNEL, CONTENT, 0, 2>{});
      return;
    }
    throw std::runtime_error("fastnce: rows of " + std::to_string(p.depth) + " columns are too long for this kernel");
  }
  if constexpr (KERNEL != Kernel::WEIGHTS_BLOCK) {
    if (p.parts == 2)
      p.depth == 64 ? run(Form<KERNEL, CONTENT, 64, 2>{}) : run(Form<KERNEL, CONTENT, 128, 2>{});
    else
      p.depth == 64    ? run(Form<KERNEL, CONTENT, 64, 1>{})
      : p.depth == 128 ? run(Form<KERNEL, CONTENT, 128, 1>{})
                       : run(Form<KERNEL, CONTENT, 256, 1>{});
  }
}

// run(Form{}, std::bool_constant<content>) for the form and the rules of this problem.
template <Kernel KERNEL, class Run>
void with_form_and_rules(const Problem& p, const Run& run) {
  if (p.rules.by_content())
    with_form<KERNEL, true>(p, [&](auto form) { run(form, std::true_type{}); });
  else
    with_form<KERNEL, false>(p, [&](auto form) { run(form, std::false_type{}); });
}

}  // namespace fastnce::cuda
