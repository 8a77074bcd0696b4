#include "forward_wgmma.cuh"

#ifndef FASTNCE_EMULATED
namespace fastnce::cuda {

TensorMap tensor_map(const uint16_t* base, int64_t rows, int columns, int box_rows) {
  // A function of the driver, looked up at run time: the library also loads where there is no driver.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status), "cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) throw std::runtime_error("fastnce: this CUDA driver has no cuTensorMapEncodeTiled");
  TensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   pitch[1] = {2 * static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[2] = {GROUP, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<uint16_t*>(base), sizes, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("fastnce: cuTensorMapEncodeTiled failed with status " + std::to_string(status));
  return map;
}

}  // namespace fastnce::cuda
#endif

namespace fastnce::cuda {
namespace {

template <Kernel KERNEL, class Run>
void with_walk(const Problem& p, const Run& run) {
  const auto with_depth = [&](auto content) {
    constexpr bool C = decltype(content)::value;
    p.depth == 64 ? run(Walk<KERNEL, 64, C>{}) : p.depth == 128 ? run(Walk<KERNEL, 128, C>{}) : run(Walk<KERNEL, 256, C>{});
  };
  p.rules.by_content() ? with_depth(std::true_type{}) : with_depth(std::false_type{});
}

}  // namespace

void wgmma_forward_rows(const Problem& p, const Grid& grid, const RowSums& out, Stream stream) {
  with_walk<Kernel::FORWARD_ROWS>(p, [&](auto walk) {
    using W = decltype(walk);
    const OperandMaps maps(p, W::BM, W::BN);
    launch(wgmma_forward_rows<W>, programs(p, grid, W::BM), WGMMA_THREADS, W::BYTES, stream, maps.x, maps.y, p, grid, out);
  });
}

void wgmma_forward_both(const Problem& p, const Grid& grid, const BothSums& out, Stream stream) {
  with_walk<Kernel::FORWARD_BOTH>(p, [&](auto walk) {
    using W = decltype(walk);
    const OperandMaps maps(p, W::BM, W::BN);
    launch(wgmma_forward_both<W>, programs(p, grid, W::BM), WGMMA_THREADS, W::BYTES, stream, maps.x, maps.y, p, grid, out);
  });
}

}  // namespace fastnce::cuda
