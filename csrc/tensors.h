// Checks of a tensor before a kernel gets its pointer, for both bind.cpp. By torch's stable ABI: one library serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

// In an anonymous namespace, because one unit of each library includes this.
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

template <class T>
constexpr ScalarType TYPE = ScalarType::Undefined;
template <>
constexpr ScalarType TYPE<float> = ScalarType::Float;
template <>
constexpr ScalarType TYPE<double> = ScalarType::Double;
template <>
constexpr ScalarType TYPE<int> = ScalarType::Int;
template <>
constexpr ScalarType TYPE<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType TYPE<bool> = ScalarType::Bool;
// The bits of a float16.
template <>
constexpr ScalarType TYPE<uint16_t> = ScalarType::Half;

const char* name_of(ScalarType type) {
  constexpr std::pair<ScalarType, const char*> names[] = {
      {ScalarType::Float, "float32"}, {ScalarType::Double, "float64"}, {ScalarType::Half, "float16"}, {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Int, "int32"},     {ScalarType::Long, "int64"},     {ScalarType::Bool, "bool"},    {ScalarType::Byte, "uint8"},
  };
  for (const auto& [known, name] : names)
    if (type == known) return name;
  return "another dtype";
}

// The data of a contiguous tensor of `count` elements, on whatever device.
template <class T>
T* contiguous(const Tensor& tensor, int64_t count, const char* name, size_t aligned = sizeof(T)) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == TYPE<T>, "fastnce: ", name, " must be ", name_of(TYPE<T>), ", got ", name_of(type));
  STD_TORCH_CHECK(tensor.numel() == count, "fastnce: ", name, " must have ", count, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), "fastnce: ", name, " must be contiguous");
  void* at = tensor.data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(at) % aligned == 0, "fastnce: ", name, " must be aligned to ", aligned, " bytes");
  return static_cast<T*>(at);
}

// The memory of an operator's arguments. Threads of a kernel read and write in any order, so memory that is written may be part of no other
// argument.
class Memory {
 public:
  template <class... T>
  Memory& reads(const T&... arguments) {
    (add(arguments, false), ...);
    return *this;
  }

  template <class... T>
  Memory& writes(const T&... arguments) {
    (add(arguments, true), ...);
    return *this;
  }

  void check() const {
    for (size_t a = 0; a < spans_.size(); ++a)
      for (size_t b = 0; b < a; ++b) {
        const bool apart = spans_[a].end <= spans_[b].begin || spans_[b].end <= spans_[a].begin;
        STD_TORCH_CHECK(apart || !(spans_[a].written || spans_[b].written), "fastnce: what is written overlaps another argument");
      }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    bool written;
  };

  void add(const Tensor& tensor, bool written) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    if (tensor.numel() > 0) spans_.push_back({begin, begin + (last + 1) * tensor.element_size(), written});
  }
  void add(const Optional& tensor, bool written) {
    if (tensor) add(*tensor, written);
  }
  void add(const Tensors& tensors, bool written) {
    for (const Tensor& tensor : tensors) add(tensor, written);
  }

  std::vector<Span> spans_;
};

}  // namespace
