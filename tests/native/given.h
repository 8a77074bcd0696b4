// The instructions of emulator.h as they are called, for witness.cpp: each writes down what it is given, and does nothing else. One thread
// runs at a time.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "emulator.h"

namespace recorder {

// The thread that runs, and shared memory, which begins at address 0.
extern int thread;
extern char shared[256 << 10];

struct Product {
  const float* c;
  int n;
  const uint32_t* a;
  uint64_t descriptor_a, descriptor_b;
  bool by_rows, accumulate;
};
struct WarpProduct {
  const float* c;
  std::array<uint32_t, 4> a;
  std::array<uint32_t, 2> b;
};
struct Box {
  int byte;
  const emulator::TensorMap* map;
  int column, row;
};
struct Copy {
  int byte;
  const uint16_t* from;
};
struct Given {
  std::vector<Product> products;
  std::vector<WarpProduct> warp_products;
  std::vector<int> rows;  // byte to which the lane points, of every ldmatrix
  std::vector<bool> transposed;
  std::vector<Box> boxes;
  std::vector<Copy> copies;
};

// The arguments of cuTensorMapEncodeTiled.
struct Encoded {
  int type;
  const void* base;
  std::array<uint64_t, 2> sizes;
  uint64_t pitch;
  std::array<uint32_t, 2> box, step;
  int interleave, swizzle, fill;
  bool aligned;  // the map itself

  bool operator==(const Encoded& other) const {
    return type == other.type && base == other.base && sizes == other.sizes && pitch == other.pitch && box == other.box &&
           step == other.step && interleave == other.interleave && swizzle == other.swizzle && fill == other.fill;
  }
};

extern Given given;
extern std::vector<Encoded> encoded;

}  // namespace recorder
