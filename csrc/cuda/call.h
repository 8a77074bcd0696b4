// One call of an operator: checks of its numbers, its tensors and where they are, and torch's stream.
#pragma once

#include <stdexcept>

#include "../tensors.h"
#include "launch.h"

#ifndef FASTNCE_EMULATED
#include <dlfcn.h>

#include "current.h"
#endif

namespace {

using fastnce::cuda::Stream;

// Alignment of tensors that kernels copy in units of 16 bytes, or write in pairs.
constexpr size_t WIDE = 16;
// Limit of rows, because indices and their sums are int32.
constexpr int64_t MOST_ROWS = int64_t{1} << 30;

int count_of(int64_t value, int64_t least, int64_t limit, const char* name) {
  STD_TORCH_CHECK(value >= least && value < limit, "fastnce: ", name, " must be from ", least, " to ", limit - 1, ", got ", value);
  return static_cast<int>(value);
}

// A diagonal j - i; 2^31 - 1 stands for none.
int diagonal(int64_t value, const char* name) { return count_of(value, -(int64_t{1} << 31) + 1, int64_t{1} << 31, name); }

// One call of an operator: all its tensors are where the first one is.
class Call {
 public:
  explicit Call(const Tensor& first) : device_(first.get_device_index()) {}

  void check(const Tensor& tensor, const char* name) const {
#ifdef FASTNCE_EMULATED
    STD_TORCH_CHECK(tensor.is_cpu(), "fastnce: ", name, " must be on the CPU: this is the tests' build of the CUDA kernels for it");
#else
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_, "fastnce: ", name,
                    " must be on the CUDA device of the other tensors");
#endif
  }

  // The data of a contiguous tensor of `count` elements.
  template <class T>
  T* data(const Tensor& tensor, int64_t count, const char* name, size_t aligned = sizeof(T)) const {
    check(tensor, name);
    return contiguous<T>(tensor, count, name, aligned);
  }

  template <class T>
  T* data(const Optional& tensor, int64_t count, const char* name, size_t aligned = sizeof(T)) const {
    return tensor ? data<T>(*tensor, count, name, aligned) : nullptr;
  }

  // launch(stream): torch's current stream of the device of the tensors.
  template <class Launch>
  void run(const Launch& launch) const {
#ifdef FASTNCE_EMULATED
    launch(nullptr);
#else
    // The caller has made this torch's current device; the CUDA runtime inside of this library is told the same.
    const OnDevice there(device_);
    cuda(there.status());
    launch(stream_of(device_));
#endif
  }

 private:
#ifndef FASTNCE_EMULATED
  static void cuda(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("fastnce: ") + cudaGetErrorString(status));
  }

  // torch's CUDA library is not linked, so that this one also loads where torch is a build for the CPU. With a tensor on a GPU it is
  // loaded.
  static Stream stream_of(int device) {
    static const auto ask = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
      return reinterpret_cast<int32_t (*)(int32_t, void**)>(found);
    }();
    STD_TORCH_CHECK(ask, "fastnce: libtorch_cuda.so does not say which stream is the current one");
    Stream stream = nullptr;
    TORCH_ERROR_CODE_CHECK(ask(device, &stream));
    return stream;
  }
#endif
  int device_;
};

}  // namespace
