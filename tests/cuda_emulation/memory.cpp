// Watches every access of a kernel to shared and global memory. The compiler calls these functions
// where it would call ThreadSanitizer (-fsanitize=thread); instead of that library they
//   - find races: two threads touch the same byte, one writes, not both by atomics, and no barrier
//   lies between;
//   - find shared memory that is read before the block wrote it, or beyond what the launch asked
//   for;
//   - find vectors that are not aligned to their size.
// An executor (emulation.h) calls watch_access() instead.
// For each byte the last write and two last reads by different threads are kept, each as a segment:
// one thread, from one barrier to the next. Nothing depends on the order in which threads happen to
// run.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace emulation {

namespace {

struct Segment {
  int launch;
  uint64_t block;
  uint32_t thread;
  Clock clock;
};

// What of other blocks' work a block has seen: through an atomic of theirs after a __threadfence,
// and one of its own on the same address.
struct Seen {
  std::map<std::pair<uint64_t, uint32_t>, uint32_t>
      of_thread;                          // (block, thread): up to and with this block barrier
  std::map<uint64_t, uint32_t> of_block;  // all threads: up to, but without, this block barrier

  void merge(const Seen& other) {
    for (const auto& [thread, barriers] : other.of_thread) {
      of_thread[thread] = std::max(of_thread[thread], barriers);
    }
    for (const auto& [block, barriers] : other.of_block) {
      of_block[block] = std::max(of_block[block], barriers);
    }
  }
};

struct Launch {
  int stream;
  uint64_t begin, end;
  std::map<uintptr_t, Seen> published;  // by address of the atomic
};

// Segments of the accesses to one byte; 0 is none.
struct Byte {
  uint32_t write = 0;
  uint32_t atomic = 0;
  uint32_t reads[2] = {};
};

constexpr uintptr_t kPage = 1024;
constexpr uint32_t kMostAccesses = 1u << 23;  // of a thread from one switch to the next

struct {
  std::vector<Segment> segments{1};
  std::vector<Launch> launches;
  int launch = 0;
  int launches_running = 0;
  uint64_t time = 0;
  Seen seen;  // by the block that runs
  std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
  std::pair<uintptr_t, Byte*> recent[64] = {};

  Byte* page(uintptr_t number) {
    auto& entry = recent[number % 64];
    if (entry.second == nullptr || entry.first != number) {
      auto& page = pages[number];
      if (!page) {
        page = std::make_unique<Byte[]>(kPage);
      }
      entry = {number, page.get()};
    }
    return entry.second;
  }

  void forget(uintptr_t begin, uintptr_t end) {
    while (begin < end) {
      const uintptr_t next = std::min((begin / kPage + 1) * kPage, end);
      if (const auto found = pages.find(begin / kPage); found != pages.end()) {
        std::fill_n(found->second.get() + begin % kPage, next - begin, Byte{});
      }
      begin = next;
    }
  }
} memory;

bool happened_before(uint32_t earlier_segment) {
  const Segment& earlier = memory.segments[earlier_segment];
  if (earlier_segment == 0 || earlier_segment == running.segment) {
    return true;
  }
  if (earlier.launch != memory.launch) {
    const Launch &a = memory.launches[earlier.launch], &b = memory.launches[memory.launch];
    return a.stream == b.stream || a.end < b.begin;
  }
  if (earlier.block != running.block) {
    const auto of_block = memory.seen.of_block.find(earlier.block);
    if (of_block != memory.seen.of_block.end() && earlier.clock.block_barriers < of_block->second) {
      return true;
    }
    const auto of_thread = memory.seen.of_thread.find({earlier.block, earlier.thread});
    return of_thread != memory.seen.of_thread.end() &&
           earlier.clock.block_barriers <= of_thread->second;
  }
  return earlier.thread == running.thread ||
         earlier.clock.block_barriers < running.clock.block_barriers ||
         (earlier.thread / 32 == running.thread / 32 &&
          earlier.clock.warp_barriers < running.clock.warp_barriers);
}

[[noreturn]] void fail_race(uintptr_t address, bool shared, AccessKind kind,
                            uint32_t earlier_segment, const char* did, const void* code) {
  const Segment& earlier = memory.segments[earlier_segment];
  std::ostringstream text;
  const char* const does[] = {"reads", "writes", "changes by an atomic"};
  text << "race on " << (shared ? "shared" : "global") << " memory 0x" << std::hex << address
       << ": this thread " << does[kind] << " what ";
  if (earlier.launch != memory.launch) {
    text << "another stream's kernel ";
  } else {
    text << thread_name(earlier.thread, earlier.block) << " ";
  }
  text << did << ", and nothing orders the two";
  fail_at_code(text.str(), code);
}

void access(uintptr_t address, size_t size, AccessKind kind, const void* code) {
  if (!running.is_watched || stacks().contains(address) ||
      address - reinterpret_cast<uintptr_t>(&now) < sizeof now) {
    return;
  }
  const Unwatched unwatched;
  if (++running.accesses > kMostAccesses) {
    fail_at_code("the thread does not end: it waits for what only another one can do", code);
  }
  const bool shared = shared_variables().contains(address);
  if (shared && dynamic_shared_rest().contains(address + size - 1)) {
    fail_at_code("access beyond the dynamic shared memory that the launch asked for", code);
  }
  if (running.segment == 0) {
    running.segment = static_cast<uint32_t>(memory.segments.size());
    memory.segments.push_back({memory.launch, running.block, running.thread, running.clock});
  }
  if (kind == kWrite) {
    running.fenced = false;
  }
  for (const uintptr_t end = address + size; address < end; ++address) {
    Byte& byte = memory.page(address / kPage)[address % kPage];
    if (shared && kind != kWrite && byte.write == 0 && byte.atomic == 0) {
      fail_at_code("read of shared memory that nobody in the block has written yet", code);
    }
    if (!happened_before(byte.write)) {
      fail_race(address, shared, kind, byte.write, "writes", code);
    }
    if (kind != kAtomic && !happened_before(byte.atomic)) {
      fail_race(address, shared, kind, byte.atomic, "changes by an atomic", code);
    }
    if (kind == kRead) {
      uint32_t* const reads = byte.reads;
      const auto replaceable = [](uint32_t read) { return happened_before(read); };
      if (replaceable(reads[0])) {
        reads[0] = running.segment;
      } else if (replaceable(reads[1])) {
        reads[1] = running.segment;
      }
      continue;
    }
    for (const uint32_t read : byte.reads) {
      if (!happened_before(read)) {
        fail_race(address, shared, kind, read, "reads", code);
      }
    }
    (kind == kWrite ? byte.write : byte.atomic) = running.segment;
  }
}

void aligned_access(uintptr_t address, size_t size, AccessKind kind, const void* code) {
  if (address % size != 0 && running.is_watched) {
    const Unwatched unwatched;
    std::ostringstream text;
    text << "misaligned access to " << size << " bytes at 0x" << std::hex << address;
    fail_at_code(text.str(), code);
  }
  access(address, size, kind, code);
}

void atomic_access(const volatile void* pointer, size_t size, const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  aligned_access(address, size, kAtomic, code);
  if (!running.is_watched || shared_variables().contains(address)) {
    return;
  }
  const Unwatched unwatched;
  Seen& published = memory.launches[memory.launch].published[address];
  memory.seen.merge(published);
  if (running.fenced) {
    published.merge(memory.seen);
    published.of_block[running.block] = running.clock.block_barriers;
    published.of_thread[{running.block, running.thread}] = running.clock.block_barriers;
  }
}

struct {
  std::mutex mutex;
  std::vector<Region> regions;
  size_t last = 0;  // the one that was asked for last
} allocations;

}  // namespace

void allow_access(const void* begin, size_t size) {
  const std::lock_guard<std::mutex> lock(allocations.mutex);
  allocations.regions.push_back({reinterpret_cast<uintptr_t>(begin), size});
}

void forget_allocations() {
  const std::lock_guard<std::mutex> lock(allocations.mutex);
  allocations.regions.clear();
}

bool is_allocated(uintptr_t address, size_t size) {
  const auto holds = [&](size_t i) {
    return i < allocations.regions.size() && allocations.regions[i].contains(address) &&
           allocations.regions[i].contains(address + size - 1);
  };
  if (holds(allocations.last)) {
    return true;
  }
  for (size_t i = 0; i < allocations.regions.size(); ++i) {
    if (holds(i)) {
      allocations.last = i;
      return true;
    }
  }
  return false;
}

void watch_access(uintptr_t address, size_t size, AccessKind kind, const void* code) {
  if (kind == kAtomic) {
    atomic_access(reinterpret_cast<const volatile void*>(address), size, code);
  } else {
    access(address, size, kind, code);
  }
}

int begin_launch(int stream) {
  if (memory.launches_running++ == 0) {
    memory.pages.clear();
    std::fill(std::begin(memory.recent), std::end(memory.recent), std::pair<uintptr_t, Byte*>{});
    memory.segments.resize(1);
    memory.launches.clear();
  }
  memory.launches.push_back({stream, ++memory.time, ~uint64_t{0}, {}});
  return static_cast<int>(memory.launches.size()) - 1;
}

void begin_block(int launch) {
  memory.launch = launch;
  memory.seen = {};
  memory.forget(shared_variables().begin, shared_variables().begin + shared_variables().size);
}

void end_launch(int launch) {
  memory.launches[launch].end = ++memory.time;
  --memory.launches_running;
}

}  // namespace emulation

// ---- what the compiler calls --------------------------------------------------------------------

using namespace emulation;

#define CODE __builtin_return_address(0)
#define ADDRESS reinterpret_cast<uintptr_t>(address)
extern "C" {

#define ACCESS(size)                                                                               \
  void __tsan_read##size(void* address) { aligned_access(ADDRESS, size, kRead, CODE); }            \
  void __tsan_write##size(void* address) { aligned_access(ADDRESS, size, kWrite, CODE); }          \
  void __tsan_unaligned_read##size(void* address) { access(ADDRESS, size, kRead, CODE); }          \
  void __tsan_unaligned_write##size(void* address) { access(ADDRESS, size, kWrite, CODE); }        \
  /* Volatile is how a kernel looks at what others change by atomics. */                           \
  void __tsan_volatile_read##size(void* address) { aligned_access(ADDRESS, size, kAtomic, CODE); } \
  void __tsan_volatile_write##size(void* address) { aligned_access(ADDRESS, size, kAtomic, CODE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void* address, size_t size) { access(ADDRESS, size, kRead, CODE); }
void __tsan_write_range(void* address, size_t size) { access(ADDRESS, size, kWrite, CODE); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_init() {}

// Host code shares these: torch counts references.
#define ATOMIC_OP(bits, type, op)                                            \
  type __tsan_atomic##bits##_##op(volatile type* address, type value, int) { \
    atomic_access(address, sizeof(type), CODE);                              \
    return __atomic_##op(address, value, __ATOMIC_SEQ_CST);                  \
  }
#define ATOMIC(bits, type)                                                                  \
  type __tsan_atomic##bits##_load(const volatile type* address, int) {                      \
    atomic_access(address, sizeof(type), CODE);                                             \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int) {               \
    atomic_access(address, sizeof(type), CODE);                                             \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                     \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* address, type* expected, \
                                                    type value, int, int) {                 \
    atomic_access(address, sizeof(type), CODE);                                             \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST,   \
                                       __ATOMIC_SEQ_CST);                                   \
  }                                                                                         \
  ATOMIC_OP(bits, type, fetch_add)                                                          \
  ATOMIC_OP(bits, type, fetch_sub)                                                          \
  ATOMIC_OP(bits, type, fetch_and)                                                          \
  ATOMIC_OP(bits, type, fetch_or)                                                           \
  ATOMIC_OP(bits, type, fetch_xor)
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

}  // extern "C"
