// The current device of CUDA's runtime, changed for a while.
#pragma once

#include <cuda_runtime_api.h>

namespace {

// Makes a device the current one of this thread, and at its end the one that was before. The current device is set here alone: the caller's
// next tensor goes to it.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(device), status_(cudaGetDevice(&before_)) {
    // Also where it is the current one already: a thread that has no context gets one.
    if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int before_;
  cudaError_t status_;
  bool changed_;
};

}  // namespace
