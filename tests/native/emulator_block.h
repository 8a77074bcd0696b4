// A block of the emulator, and what its threads do beside their own work: emulator.cpp runs it, emulator_instructions.cpp has the
// instructions that its threads carry out.
#pragma once

#include <deque>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int WARP = 32;

struct Copy {
  char* to;
  const void* from;
};

// A wgmma that has been issued, with the arguments of its 128 threads.
struct Product {
  struct Lane {
    float* c;
    const uint32_t* from;  // registers of a, and their values then
    uint32_t a[4];
  } lane[MOST];
  int n;
  bool registers, by_rows, accumulate;
  uint64_t descriptor_a, descriptor_b;
  std::vector<uint16_t> seen;  // the operands in shared memory when it was issued
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  bool done = false;
  bool lingers = false;
  bool (*ready)(const void*) = nullptr;  // the condition that it waits for, or null
  const void* condition = nullptr;
  std::vector<Copy> copies;              // not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, not yet waited for
  unsigned met[2] = {0, 0};              // how often this thread met its warp, its warpgroup
};

struct Meeting {
  Slots slots[2];  // used in turn: no thread is more than one meeting behind
  const char* what = nullptr;
  size_t size = 0;
  int arrived = 0;
  unsigned times = 0;
};

struct Warpgroup {
  bool fenced = false;
  std::vector<Product> open;                              // not yet committed
  std::deque<std::vector<Product>> groups;                // committed, not yet waited for
  std::unordered_map<float*, std::vector<float>> hidden;  // true accumulators of what is under way
};

struct Barrier {
  int arrivals = 0, left = 0, bytes = 0;
  unsigned phase = 0;
  std::vector<std::function<int()>> loads;  // each returns the bytes it has brought
};

struct Block {
  int index, count;
  std::vector<Fiber> fibers;
  char* shared;
  size_t shared_bytes;
  int at_sync = 0;
  unsigned syncs = 0;
  std::vector<Meeting> meetings[2];
  std::vector<Warpgroup> warpgroups;
  std::unordered_map<uint64_t*, Barrier> barriers;
  bool late;
  const std::function<void()>* kernel;
};

// The block that is running, and its thread that is. __thread: no other file has to ask whether they are initialised.
extern __thread Block* block;
extern __thread int current;

uint64_t random_number();

inline Fiber& self() { return block->fibers[current]; }

// Hands the processor back to the scheduler, which may take up another thread.
void leave(bool for_good);

// Lets other threads go on until the condition holds.
template <class Condition>
void wait_until(const Condition& holds) {
  if (holds()) return;
  Fiber& fiber = self();
  fiber.condition = &holds;
  fiber.ready = [](const void* condition) { return (*static_cast<const Condition*>(condition))(); };
  leave(false);
  fiber.ready = nullptr;
}

// In half of the blocks: lets the others go on until none can. Everything that may happen before the rest of this thread has then happened.
void linger();

void check_shared(const void* p, size_t bytes, const char* what);

}  // namespace emulator
