#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "emulator_block.h"

#if !defined(__x86_64__)
#error "the emulator switches between fibers in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Switches stacks: saves the registers that the System V ABI asks a callee to keep on the old one, and loads them from the new one.
extern "C" void fastnce_emulator_switch(void** left, void* entered);
asm(R"(
.text
.globl fastnce_emulator_switch
.hidden fastnce_emulator_switch
.type fastnce_emulator_switch, @function
fastnce_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnce_emulator_switch, .-fastnce_emulator_switch
)");

namespace emulator {

__thread Block* block = nullptr;
__thread int current = 0;

namespace {

constexpr size_t STACK = 256 << 10;

thread_local void* scheduler = nullptr;
thread_local uint64_t state = 1;
#if defined(__SANITIZE_ADDRESS__)
thread_local const void* scheduler_stack = nullptr;
thread_local size_t scheduler_size = 0;
#endif

void enter(int thread) {
  current = thread;
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, STACK);
#endif
  fastnce_emulator_switch(&scheduler, fiber.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void body() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*block->kernel)();
  self().done = true;
  leave(true);
  std::abort();
}

// Stacks are kept from block to block: new pages for hundreds of stacks would cost more than most blocks compute.
void prepare(Fiber& fiber, size_t thread) {
  thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[STACK]);
  fiber.stack = stacks[thread].get();
#if defined(__SANITIZE_ADDRESS__)
  // Functions that never returned have left red zones.
  __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + STACK) & ~uintptr_t(15);
  // As if body had been called: at its first instruction the stack pointer is 8 below a multiple of 16.
  void** sp = reinterpret_cast<void**>(top) - 1;
  *--sp = reinterpret_cast<void*>(&body);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.sp = sp;
}

// Lets each of these threads go on once, if it can. Returns whether there was one.
bool step(const int* threads, int count) {
  bool some = false;
  for (int n = 0; n < count; ++n) {
    const Fiber& fiber = block->fibers[threads[n]];
    if (fiber.done || fiber.lingers || (fiber.ready && !fiber.ready(fiber.condition))) continue;
    enter(threads[n]);
    some = true;
  }
  return some;
}

// Runs a block, with its threads in a random order. Either all take turns, or one warp goes ahead of the others as far as it can, then a
// second one. A last warp goes on only when no other can. Mostly it is one of the first four: those copy for the others, which must wait
// for them.
void run_block() {
  const int threads = static_cast<int>(block->fibers.size()), warps = threads / WARP;
  const auto below = [](int limit) { return static_cast<int>(random_number() % limit); };
  const auto shuffle = [&](int* of, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(of[i], of[below(i + 1)]);
  };
  std::vector<int> order(threads), warp_order(warps);
  for (int i = 0; i < warps; ++i) warp_order[i] = i;
  shuffle(warp_order.data(), warps);
  const int last = below(below(2) ? warps : std::min(warps, 4));
  std::swap(*std::find(warp_order.begin(), warp_order.end(), last), warp_order.back());
  for (int i = 0; i < threads; ++i) order[i] = warp_order[i / WARP] * WARP + i % WARP;
  for (int i = 0; i < threads; i += WARP) shuffle(&order[i], WARP);
  const bool turns = below(2);
  block->late = below(2);
  const int others = threads - WARP;
  if (turns) shuffle(order.data(), others);
  const auto advance = [&] {
    if (turns) return step(order.data(), others);
    for (int i = 0; i < others; i += WARP)
      if (step(&order[i], WARP)) return true;
    return false;
  };
  std::vector<int> lingering;
  for (;;) {
    while (advance()) continue;
    lingering.clear();
    for (const int thread : order)
      if (block->fibers[thread].lingers) lingering.push_back(thread);
    if (lingering.empty()) {
      if (step(&order[others], WARP)) continue;
      break;
    }
    // One warp at a time of those that linger.
    const int warp = lingering[below(static_cast<int>(lingering.size()))] / WARP;
    for (const int thread : lingering)
      if (thread / WARP == warp) block->fibers[thread].lingers = false;
  }
  for (const Fiber& fiber : block->fibers)
    if (!fiber.done) fail("all threads wait for each other");
  for (const Fiber& fiber : block->fibers)
    if (!fiber.copies.empty() || !fiber.groups.empty()) fail("a thread ends with copies under way");
  for (const Warpgroup& group : block->warpgroups)
    if (!group.open.empty() || !group.groups.empty()) fail("a warpgroup ends with products under way");
  for (const auto& barrier : block->barriers)
    if (!barrier.second.loads.empty()) fail("a block ends with TMA loads under way");
}

}  // namespace

uint64_t random_number() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

void leave(bool for_good) {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_size);
#else
  (void)for_good;
#endif
  fastnce_emulator_switch(&fiber.sp, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void linger() {
  if (!block->late) return;
  self().lingers = true;
  leave(false);
}

void check_shared(const void* p, size_t bytes, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (at < block->shared || at + bytes > block->shared + block->shared_bytes) fail(what);
}

void fail(const char* what) {
  std::fprintf(stderr, "emulator: block %d, thread %d: %s\n", block ? block->index : -1, current, what);
  std::fflush(stderr);
  std::abort();
}

void seed(uint64_t value) { state = value * 2 + 1; }

constexpr std::align_val_t ALIGNED{1024};
struct Free {
  void operator()(char* p) const { ::operator delete(p, ALIGNED); }
};

void run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32) fail("threads that are no whole warps");
  for (int index = 0; index < blocks; ++index) {
    Block now{};
    now.index = index;
    now.count = blocks;
    now.fibers.resize(threads);
    now.kernel = &kernel;
    // Shared memory ends where the allocation ends, so that AddressSanitizer sees an access behind it. Bytes that are not written yet are
    // nan.
    const std::unique_ptr<char, Free> memory(static_cast<char*>(::operator new(shared_bytes, ALIGNED)));
    now.shared = memory.get();
    now.shared_bytes = shared_bytes;
    std::memset(now.shared, 0xff, shared_bytes);
    now.meetings[0].resize(threads / 32);
    now.meetings[1].resize((threads + MOST - 1) / MOST);
    now.warpgroups.resize((threads + MOST - 1) / MOST);
    for (int thread = 0; thread < threads; ++thread) prepare(now.fibers[thread], thread);
    block = &now;
    run_block();
    block = nullptr;
  }
}

int thread_index() { return current; }
int block_index() { return block->index; }
int block_count() { return block->count; }
char* shared_memory() { return block->shared; }
uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - block->shared); }

void sync_block() {
  const unsigned now = block->syncs;
  if (++block->at_sync == static_cast<int>(block->fibers.size())) {
    block->at_sync = 0;
    ++block->syncs;
  }
  wait_until([&] { return block->syncs != now; });
}

const Slots& meet(int lanes, const char* what, const void* mine, size_t size) {
  const int kind = lanes == 32 ? 0 : 1;
  Meeting& meeting = block->meetings[kind][current / lanes];
  const unsigned time = self().met[kind]++;
  if (time != meeting.times) fail("a thread is ahead of its warp");
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.size = size;
  } else if (meeting.size != size || (meeting.what != what && std::strcmp(meeting.what, what))) {
    fail((std::string("threads of one warp are at different instructions: ") + meeting.what + " and " + what).c_str());
  }
  Slots& slots = meeting.slots[time % 2];
  std::memcpy(slots.bytes[current % lanes], mine, size);
  if (++meeting.arrived == lanes) {
    meeting.arrived = 0;
    ++meeting.times;
  }
  wait_until([&] { return meeting.times != time; });
  return slots;
}

}  // namespace emulator
