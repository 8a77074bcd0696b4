#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

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
namespace {

// Functions without sanitizers: most of the time is spent in them, and they access arrays of this file alone.
#define UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("undefined")))

constexpr size_t STACK = 256 << 10;
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

thread_local Block* block = nullptr;
thread_local int current = 0;
thread_local void* scheduler = nullptr;
thread_local uint64_t state = 1;
#if defined(__SANITIZE_ADDRESS__)
thread_local const void* scheduler_stack = nullptr;
thread_local size_t scheduler_size = 0;
#endif

uint64_t random_number() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

Fiber& self() { return block->fibers[current]; }

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
void linger() {
  if (!block->late) return;
  self().lingers = true;
  leave(false);
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

void check_shared(const void* p, size_t bytes, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (at < block->shared || at + bytes > block->shared + block->shared_bytes) fail(what);
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

const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      _Float16 value;
      std::memcpy(&value, &bits, 2);
      values[i] = static_cast<float>(value);
    }
    return values;
  }();
  return table.data();
}

// The address of element (row, k) of an operand that a descriptor describes. PTX ISA, "Matrix descriptor" and "Canonical layouts": in the
// 128-byte swizzle the 16-byte unit of an address is permuted by bits of the address itself.
const char* described(uint64_t descriptor, bool by_rows, int row, int k) {
  if (descriptor >> 62 != 1) fail("wgmma: a descriptor without the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("wgmma: a descriptor with a base offset");
  const int64_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  int64_t byte;
  if (!by_rows)
    // K-major: 8 rows of 128 bytes make an atom, stride leads to the next eight; the instruction takes 32 bytes of k.
    byte = row % 8 * 128 + row / 8 * stride + 2 * k;
  else
    // MN-major: 64 neighbours in 128 bytes, k goes down the rows; leading to the next 64 neighbours, stride to the next eight k.
    byte = row % 64 * 2 + row / 64 * leading + k % 8 * 128 + k / 8 * stride;
  int64_t address = start + byte;
  address ^= (address >> 7 & 7) << 4;
  if (address < 0 || address + 2 > static_cast<int64_t>(block->shared_bytes)) fail("wgmma: an operand outside of shared memory");
  return block->shared + address;
}

uint16_t read_half(const char* from) {
  uint16_t bits;
  std::memcpy(&bits, from, 2);
  return bits;
}

std::vector<uint16_t> operands(const Product& product) {
  std::vector<uint16_t> found;
  if (!product.registers)
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k) found.push_back(read_half(described(product.descriptor_a, false, row, k)));
  for (int n = 0; n < product.n; ++n)
    for (int k = 0; k < 16; ++k) found.push_back(read_half(described(product.descriptor_b, product.by_rows, n, k)));
  return found;
}

void execute(Warpgroup& group, const Product& product) {
  const std::vector<uint16_t> found = operands(product);
  if (found != product.seen) fail("wgmma: its operands changed while it was under way");
  const float* values = half_table();
  std::vector<float> a(64 * 16), b(product.n * 16);
  size_t at = 0;
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      if (!product.registers) {
        a[row * 16 + k] = values[found[at++]];
        continue;
      }
      const auto& lane = product.lane[row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
      a[row * 16 + k] = values[lane.a[row % 16 / 8 + k / 8 * 2] >> (k % 2 * 16) & 0xffff];
    }
  for (float& value : b) value = values[found[at++]];
  for (int thread = 0; thread < MOST; ++thread) {
    const Product::Lane& lane = product.lane[thread];
    if (product.registers && std::memcmp(lane.from, lane.a, sizeof lane.a)) fail("wgmma: its registers changed while it was under way");
    std::vector<float>& c = group.hidden.at(lane.c);
    for (int e = 0; e < product.n / 2; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + thread % 4 * 2 + e % 2;
      c[e] = add_products(product.accumulate ? c[e] : 0.0f, &a[row * 16], &b[column * 16], 16);
    }
  }
}

}  // namespace

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

// Register r of lane l: two neighbours of row l / 4 of matrix r, or, transposed, of its column l / 4.
void ldmatrix(uint32_t (&r)[4], const char* row, bool transposed) {
  check_shared(row, 16, "ldmatrix: outside of shared memory");
  if (shared_address(row) % 16) fail("ldmatrix: a row that is not aligned to 16 bytes");
  const Slots& all = meet(WARP, transposed ? "ldmatrix.trans" : "ldmatrix", &row, sizeof row);
  const int lane = current % WARP;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t two[2];
    for (int e = 0; e < 2; ++e) {
      const int along = lane % 4 * 2 + e, across = lane / 4;
      const char* from;
      std::memcpy(&from, all.bytes[matrix * 8 + (transposed ? along : across)], sizeof from);
      two[e] = read_half(from + 2 * (transposed ? across : along));
    }
    r[matrix] = two[0] | two[1] << 16;
  }
}

// PTX ISA, mma.m16n8k16: a0, a1 are (g, 2t..), a2, a3 (g + 8, 2t..), a4.. the same 8 further in k; b0, b1 are (2t.., g), b2, b3 8 further.
UNCHECKED static void multiply(float* c, const Slots& all, int lane) {
  float left[2][16], right[2][16];
  for (int two = 0; two < 2; ++two)
    for (int k = 0; k < 16; k += 2) {
      const int of = k % 8 / 2;
      __builtin_memcpy(&left[two][k], all.bytes[lane / 4 * 4 + of] + 8 * (two + k / 8 * 2), 8);
      __builtin_memcpy(&right[two][k], all.bytes[(lane % 4 * 2 + two) * 4 + of] + 8 * (4 + k / 8), 8);
    }
  for (int e = 0; e < 4; ++e) c[e] = add_products(c[e], left[e / 2], right[e % 2], 16);
}

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  // float16 is converted once, by the lane that holds it, and not by every lane that reads it.
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const float* values = half_table();
  float mine[12];
  for (int n = 0; n < 12; ++n) mine[n] = values[registers[n / 2] >> n % 2 * 16 & 0xffff];
  const Slots& all = meet(WARP, "mma", mine, sizeof mine);
  multiply(c, all, current % WARP);
}

void copy_async(char* shared, const void* global) {
  check_shared(shared, 16, "cp.async: outside of shared memory");
  if (shared_address(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async: an address that is not aligned to 16 bytes");
  std::memset(shared, 0xff, 16);
  self().copies.push_back({shared, global});
}
void copy_commit() {
  self().groups.push_back(std::move(self().copies));
  self().copies.clear();
}
void copy_wait(int pending) {
  if (static_cast<int>(self().groups.size()) > pending) linger();
  while (static_cast<int>(self().groups.size()) > pending) {
    for (const Copy& copy : self().groups.front()) std::memcpy(copy.to, copy.from, 16);
    self().groups.pop_front();
  }
}

// The content of a barrier's memory. Another value there means that a thread has written over it.
constexpr uint64_t MARK = 0x6d62617272696572;

void barrier_init(uint64_t* barrier, int arrivals) {
  check_shared(barrier, 8, "mbarrier: outside of shared memory");
  block->barriers[barrier] = Barrier{arrivals, arrivals, 0, 0, {}};
  *barrier = MARK;
}

static Barrier& barrier_at(uint64_t* at) {
  const auto found = block->barriers.find(at);
  if (found == block->barriers.end()) fail("mbarrier: not initialised");
  if (*at != MARK) fail("mbarrier: written over");
  return found->second;
}

static void complete(Barrier& barrier) {
  if (barrier.left == 0 && barrier.bytes == 0) {
    barrier.left = barrier.arrivals;
    ++barrier.phase;
  }
}

void barrier_arrive(uint64_t* at) {
  Barrier& barrier = barrier_at(at);
  if (barrier.left-- == 0) fail("mbarrier: more arrivals than it counts");
  complete(barrier);
  // A thread that waited for this may go on before this one.
  if (random_number() % 2) linger();
}

void barrier_expect(uint64_t* at, int bytes) {
  barrier_at(at).bytes += bytes;
  barrier_arrive(at);
}

void barrier_wait(uint64_t* at, unsigned parity) {
  Barrier& barrier = barrier_at(at);
  // The phase of this parity has ended when the current phase has the other parity.
  const auto ended = [&] { return (barrier.phase & 1) != parity; };
  while (!ended()) {
    wait_until([&] { return ended() || !barrier.loads.empty(); });
    if (ended()) return;
    linger();
    std::vector<std::function<int()>> loads = std::move(barrier.loads);
    barrier.loads.clear();
    for (const auto& load : loads) barrier.bytes -= load();
    if (!loads.empty()) complete(barrier);
  }
}

void tensor_load(char* shared, const TensorMap* map, uint64_t* at, int column, int row) {
  const int bytes = map->box_rows * map->box_columns * 2;
  check_shared(shared, bytes, "TMA: outside of shared memory");
  if (map->box_columns != 64 || shared_address(shared) % 1024) fail("TMA: 128-byte swizzle takes 64 columns and atoms of 1024 bytes");
  std::memset(shared, 0xff, bytes);
  // The map is copied: it is a parameter of the kernel, and ends with the thread.
  barrier_at(at).loads.push_back([=, of = *map] {
    for (int r = 0; r < of.box_rows; ++r)
      for (int c = 0; c < of.box_columns; ++c) {
        const bool inside = row + r < of.rows && column + c < of.columns;
        const uint16_t value = inside ? of.base[(row + r) * of.pitch + column + c] : 0;
        std::memcpy(shared + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &value, 2);
      }
    return bytes;
  });
}

void wgmma_fence() {
  const int nothing = 0;
  meet(MOST, "wgmma.fence", &nothing, sizeof nothing);
  block->warpgroups[current / MOST].fenced = true;
}

void wgmma(float* c, int n, const uint32_t* a, uint64_t descriptor_a, uint64_t descriptor_b, bool b_by_rows, bool accumulate) {
  struct Mine {
    float* c;
    const uint32_t* from;
    uint32_t a[4];
    uint64_t descriptor_a, descriptor_b;
    int n;
    bool registers, by_rows, accumulate;
  } mine{c, a, {}, descriptor_a, descriptor_b, n, a != nullptr, b_by_rows, accumulate};
  if (a) std::memcpy(mine.a, a, sizeof mine.a);
  const int thread = current;
  const Slots& all = meet(MOST, "wgmma", &mine, sizeof mine);
  Warpgroup& group = block->warpgroups[thread / MOST];
  if (!group.fenced) fail("wgmma: registers that no wgmma.fence has handed over");
  // One thread keeps the product for all.
  if (thread % MOST == 0) {
    Product product{};
    for (int lane = 0; lane < MOST; ++lane) {
      Mine other;
      std::memcpy(&other, all.bytes[lane], sizeof other);
      if (other.descriptor_b != descriptor_b || other.descriptor_a != descriptor_a || other.n != n || other.accumulate != accumulate)
        fail("wgmma: threads of one warpgroup disagree");
      product.lane[lane].c = other.c;
      product.lane[lane].from = other.from;
      std::memcpy(product.lane[lane].a, other.a, sizeof other.a);
      if (!group.hidden.count(other.c)) {
        group.hidden[other.c].assign(other.c, other.c + n / 2);
        std::fill(other.c, other.c + n / 2, std::numeric_limits<float>::quiet_NaN());
      }
    }
    product.n = n;
    product.registers = a != nullptr;
    product.by_rows = b_by_rows;
    product.accumulate = accumulate;
    product.descriptor_a = descriptor_a;
    product.descriptor_b = descriptor_b;
    product.seen = operands(product);
    group.open.push_back(std::move(product));
  }
  const int nothing = 0;
  meet(MOST, "wgmma issued", &nothing, sizeof nothing);
}

void wgmma_commit() {
  const int nothing = 0;
  meet(MOST, "wgmma.commit_group", &nothing, sizeof nothing);
  if (current % MOST == 0) {
    Warpgroup& group = block->warpgroups[current / MOST];
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  }
  meet(MOST, "wgmma committed", &nothing, sizeof nothing);
}

void wgmma_wait(int pending) {
  meet(MOST, "wgmma.wait_group", &pending, sizeof pending);
  if (current % MOST == 0) {
    Warpgroup& group = block->warpgroups[current / MOST];
    group.fenced = false;
    if (static_cast<int>(group.groups.size()) > pending) linger();
    while (static_cast<int>(group.groups.size()) > pending) {
      for (const Product& product : group.groups.front()) execute(group, product);
      // Accumulators get their values now, unless another product is under way for them.
      for (const Product& product : group.groups.front())
        for (const auto& lane : product.lane) {
          const auto hidden = group.hidden.find(lane.c);
          if (hidden == group.hidden.end()) continue;
          bool busy = false;
          for (size_t later = 1; later < group.groups.size(); ++later)
            for (const Product& other : group.groups[later]) busy |= other.lane[&lane - product.lane].c == lane.c;
          for (const Product& other : group.open) busy |= other.lane[&lane - product.lane].c == lane.c;
          if (busy) continue;
          for (int e = 0; e < product.n / 2; ++e)
            if (lane.c[e] == lane.c[e]) fail("wgmma: its sums were written while it was under way");
          std::copy(hidden->second.begin(), hidden->second.end(), lane.c);
          group.hidden.erase(hidden);
        }
      group.groups.pop_front();
    }
  }
  const int nothing = 0;
  meet(MOST, "wgmma waited", &nothing, sizeof nothing);
}

float half_to_float(uint16_t x) {
  static const float* table = half_table();
  return table[x];
}

uint16_t float_to_half(float x) {
  const auto value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

UNCHECKED float add_products(float c, const float* a, const float* b, int count) {
  double sum = c;
  for (int k = 0; k < count; ++k) sum += static_cast<double>(a[k]) * b[k];
  const float nearest = static_cast<float>(sum);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace emulator
