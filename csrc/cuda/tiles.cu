#include "forms.cuh"
#include "wgmma_forms.h"

namespace fastnce::cuda {
namespace {

template <Kernel KERNEL>
TileShape of_kernel(bool content, int parts, int depth) {
  const int rows = 16 * WARPS * strips(KERNEL, content, parts, depth);
  // forward_both has square tiles: one may also stand for its mirror image.
  return {rows, KERNEL == Kernel::FORWARD_BOTH ? rows : columns(KERNEL, content, parts, depth), MMA};
}

}  // namespace

TileShape tile_of(Kernel kernel, bool by_content, int parts, int depth, int architecture) {
  if (architecture == 90 && wgmma_serves(kernel, parts, depth)) return {WGMMA_ROWS, wgmma_columns(kernel, by_content, depth), WGMMA};
  const int held_depth = fits(kernel, parts, depth) ? depth : 0;
  switch (kernel) {
    case Kernel::FORWARD_ROWS:
      return of_kernel<Kernel::FORWARD_ROWS>(by_content, parts, held_depth);
    case Kernel::FORWARD_BOTH:
      return of_kernel<Kernel::FORWARD_BOTH>(by_content, parts, held_depth);
    case Kernel::RETRIEVAL:
      return of_kernel<Kernel::RETRIEVAL>(true, parts, held_depth);
    case Kernel::BACKWARD_ROWS:
      return of_kernel<Kernel::BACKWARD_ROWS>(by_content, parts, held_depth);
    default:
      return of_kernel<Kernel::WEIGHTS_BLOCK>(by_content, parts, 0);
  }
}

}  // namespace fastnce::cuda
