#include "launch.cuh"
#include "rows.cuh"

namespace fastnce::cuda {

// run(T{}) for the type of the rows.
template <class Run>
static void with_type(ElementType type, const Run& run) {
  type == ElementType::FLOAT ? run(float{}) : type == ElementType::HALF ? run(Half{}) : run(BFloat16{});
}

#ifndef FASTNCE_EMULATED
bool has_code() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, prepare<float>) == cudaSuccess) return true;
  cudaGetLastError();  // clears the error: otherwise the next launch would report it
  return false;
}
#endif

void prepare(const RawRows& x, const Operand& out, bool normalize, Stream stream) {
  with_type(x.type, [&](auto type) {
    launch(prepare<decltype(type)>, ceil_div(out.padded, ROWS_PER_BLOCK), ROW_THREADS, 0, stream, x, out, normalize);
  });
}

void aligned(const RawRows& x, const RawRows& y, const Aligned& of, Stream stream) {
  with_type(x.type,
            [&](auto type) { launch(aligned<decltype(type)>, ceil_div(of.pairs, ROWS_PER_BLOCK), ROW_THREADS, 0, stream, x, y, of); });
}

void finish(const RawRows& x, const RawRows& y, const Finish& of, Stream stream) {
  with_type(x.type, [&](auto type) { launch(finish<decltype(type)>, ceil_div(x.rows, ROWS_PER_BLOCK), ROW_THREADS, 0, stream, x, y, of); });
}

}  // namespace fastnce::cuda
