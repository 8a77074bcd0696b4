// What the instructions do: PTX ISA, by name.
#include <algorithm>

#include "emulator_block.h"

namespace emulator {
namespace {

// Functions without sanitizers: most of the time is spent in them, and they access arrays of this file alone.
#define UNCHECKED __attribute__((no_sanitize("address"), no_sanitize("undefined")))

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
