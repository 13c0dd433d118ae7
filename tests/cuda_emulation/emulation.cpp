// Runs a CUDA kernel on the CPU: one block after the other, each thread of a block on a stack of
// its own, from one barrier to the next. Threads switch only at barriers, votes and shuffles, in an
// order that changes; what depends on the order shows.
#include "emulation.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <vector>

#ifdef SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_poison_memory_region(...)
#define __asan_unpoison_memory_region(...)
#endif

// What every block of the device that can do least, of those focalops is built for, may use:
// compute capability 12.0.
constexpr int kSharedPerBlock = 48 << 10, kSharedPerBlockOptin = 99 << 10;

namespace focalops {
// What launch.cuh declares.
alignas(16) __shared__ unsigned char dynamic_shared_memory[kSharedPerBlockOptin];
}  // namespace focalops

namespace emulation {

Indices now;
Running running;
Executor* executor = nullptr;

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  enum State { kReady, kAtBlockBarrier, kInWarp, kExited } state = kExited;
  bool started = false;
  jmp_buf context;
  Place place;
  bool predicate;
  unsigned mask;
  uint64_t value;
  bool orders_memory;
  int count;    // what count_at_block_barrier() returns
  Lanes lanes;  // what meet_in_warp() returns
  uint3 index;
  Running self;
  void* fake_stack = nullptr;
};

enum Order { kAscending, kDescending, kShuffled };
struct {
  Order order = kAscending;
  unsigned seed = 0;
} scheduling;

// What runs of a launch: all blocks, or the last ones of a launch that is too large for that.
struct Extent {
  int multiprocessors = 2;
  uint64_t last_blocks = ~uint64_t{0};
} extent;

// One block at a time runs, whatever stream it belongs to.
struct Machine {
  std::vector<Fiber> fibers{kMaxThreads};
  char* stack = nullptr;
  int threads = 0;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  Kernel kernel = nullptr;
  size_t dynamic_bytes = 0;
  Region shared;
  std::string failure;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::mt19937 random;

  Machine() {
    stack = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED) {
      throw std::runtime_error("no memory for the stacks of the emulated threads");
    }
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(stack + i * kStackBytes, 4096, PROT_NONE);  // a stack that overflows faults
    }
  }
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

void fiber_main() {
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
  while (true) {
    (*m.body)();
    Fiber& fiber = *m.current;
    fiber.state = Fiber::kExited;
    if (_setjmp(fiber.context) == 0) {
      __sanitizer_start_switch_fiber(&fiber.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
      _longjmp(m.scheduler, 1);
    }
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.scheduler_stack, &m.scheduler_stack_size);
  }
}

// From the scheduler into a thread, until that waits or ends.
void resume(Fiber& fiber) {
  Machine& m = machine();
  char* const stack = m.stack + (&fiber - m.fibers.data()) * kStackBytes;
  m.current = &fiber;
  now.thread = fiber.index;
  running = fiber.self;
  running.accesses = 0;
  if (_setjmp(m.scheduler) == 0) {
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, stack, kStackBytes);
    if (fiber.started) {
      _longjmp(fiber.context, 1);
    }
    fiber.started = true;
    ucontext_t entry;
    getcontext(&entry);
    entry.uc_stack.ss_sp = stack;
    entry.uc_stack.ss_size = kStackBytes;
    entry.uc_link = nullptr;
    makecontext(&entry, fiber_main, 0);
    setcontext(&entry);
  }
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
  fiber.self = running;
  running.is_kernel = running.is_watched = false;
}

// From a thread back to the scheduler.
void wait() {
  Machine& m = machine();
  Fiber& fiber = *m.current;
  if (_setjmp(fiber.context) == 0) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
    _longjmp(m.scheduler, 1);
  }
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &m.scheduler_stack, &m.scheduler_stack_size);
}

int warp_begin(const Fiber& fiber) {
  return static_cast<int>(&fiber - machine().fibers.data()) / kWarp * kWarp;
}

void advance(Fiber& fiber, Clock clock) {
  fiber.self.clock = clock;
  fiber.self.segment = 0;
  fiber.state = Fiber::kReady;
}

bool same_place(const Place& a, const Place& b) {
  const auto same = [](const char* x, const char* y) { return x == y || strcmp(x, y) == 0; };
  return a.line == b.line && same(a.file, b.file) && same(a.what, b.what);
}

// Releases the threads at a block barrier once all are there.
bool release_block() {
  Machine& m = machine();
  int count = 0;
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.state != Fiber::kAtBlockBarrier || !same_place(fiber.place, m.fibers[0].place)) {
      return false;
    }
    count += fiber.predicate;
  }
  for (int i = 0; i < m.threads; ++i) {
    m.fibers[i].count = count;
    advance(m.fibers[i], {m.fibers[i].self.clock.block_barriers + 1, 0});
  }
  return true;
}

// Releases the lanes that `first` waits for once all of them that have not exited are there.
bool release_warp(const Fiber& first) {
  Machine& m = machine();
  const int begin = warp_begin(first), end = std::min(begin + kWarp, m.threads);
  Lanes lanes;
  uint32_t clock = 0;
  for (int i = begin; i < end; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (!(first.mask >> (i - begin) & 1u) || fiber.state == Fiber::kExited) {
      continue;
    }
    if (fiber.state != Fiber::kInWarp || !same_place(fiber.place, first.place) ||
        fiber.mask != first.mask) {
      return false;
    }
    lanes.present |= 1u << (i - begin);
    lanes.value[i - begin] = fiber.value;
    clock = std::max(clock, fiber.self.clock.warp_barriers + 1);
  }
  for (int i = begin; i < end; ++i) {
    if (lanes.present >> (i - begin) & 1u) {
      Fiber& fiber = m.fibers[i];
      fiber.lanes = lanes;
      advance(fiber, {fiber.self.clock.block_barriers,
                      fiber.orders_memory ? clock : fiber.self.clock.warp_barriers});
    }
  }
  return true;
}

// Who waits where, a line for neighbours that wait alike.
std::string deadlock() {
  Machine& m = machine();
  std::ostringstream out;
  out << "threads wait for each other";
  const auto describe = [&](const Fiber& fiber) {
    if (fiber.state == Fiber::kExited) {
      return std::string("exited");
    }
    std::ostringstream text;
    text << "wait at " << fiber.place.what << ", " << fiber.place.file << ":" << fiber.place.line;
    if (fiber.state == Fiber::kInWarp) {
      text << ", mask 0x" << std::hex << fiber.mask;
    }
    return text.str();
  };
  for (int i = 0; i < m.threads;) {
    int j = i;
    while (j < m.threads && describe(m.fibers[j]) == describe(m.fibers[i])) {
      ++j;
    }
    out << "\n  threads " << i << " to " << j - 1 << " " << describe(m.fibers[i]);
    i = j;
  }
  return out.str();
}

std::string triple(uint64_t i, const dim3& size) {
  std::ostringstream out;
  out << "(" << i % size.x << ", " << i / size.x % size.y << ", " << i / size.x / size.y << ")";
  return out.str();
}

std::string block_name(uint64_t block) { return "block " + triple(block, now.grid_dim); }

std::string report(const std::string& what) {
  const std::string where =
      running.is_kernel ? thread_name(running.thread, running.block) : block_name(running.block);
  return "CUDA emulation: " + what + "\n  " + where + "\n  in " + source_of(machine().kernel, true);
}

#ifdef SANITIZED
// The sanitizers end the process. They know the line, and this says which thread it was. Each
// library has its own callback.
const int say_thread_at_death = dl_iterate_phdr(
    [](dl_phdr_info* info, size_t, void*) {
      void* const library = strstr(info->dlpi_name, "san.so")
                                ? dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY)
                                : nullptr;
      if (library != nullptr) {
        using SetCallback = decltype(&__sanitizer_set_death_callback);
        reinterpret_cast<SetCallback>(dlsym(library, "__sanitizer_set_death_callback"))([] {
          if (running.is_kernel) {
            std::fprintf(stderr, "%s\n", report("stopped by a sanitizer").c_str());
          }
        });
      }
      return 0;
    },
    nullptr);
#endif

void poison_shared() {
  Machine& m = machine();
  auto* const dynamic = focalops::dynamic_shared_memory;
  const uintptr_t dynamic_begin = reinterpret_cast<uintptr_t>(dynamic);
  const uintptr_t dynamic_end = dynamic_begin + kSharedPerBlockOptin;
  std::memset(reinterpret_cast<void*>(m.shared.begin), 0xff, dynamic_begin - m.shared.begin);
  std::memset(reinterpret_cast<void*>(dynamic_end), 0xff,
              m.shared.begin + m.shared.size - dynamic_end);
  __asan_unpoison_memory_region(dynamic, kSharedPerBlockOptin);
  std::memset(dynamic, 0xff, m.dynamic_bytes);
  __asan_poison_memory_region(dynamic + m.dynamic_bytes, kSharedPerBlockOptin - m.dynamic_bytes);
}

void run_block() {
  Machine& m = machine();
  poison_shared();
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.state = Fiber::kReady;
    const unsigned x = now.block_dim.x, y = now.block_dim.y;
    fiber.index = {i % x, i / x % y, i / x / y};
    fiber.self = {};
    fiber.self.is_kernel = fiber.self.is_watched = true;
    fiber.self.thread = static_cast<uint32_t>(i);
    fiber.self.block = running.block;
  }
  std::vector<int> order(m.threads);
  std::iota(order.begin(), order.end(), 0);
  if (scheduling.order == kDescending) {
    std::reverse(order.begin(), order.end());
  }
  for (bool progress = true; progress;) {
    progress = false;
    if (scheduling.order == kShuffled) {
      std::shuffle(order.begin(), order.end(), m.random);
    }
    for (const int i : order) {
      if (m.fibers[i].state == Fiber::kReady) {
        progress = true;
        resume(m.fibers[i]);
        if (!m.failure.empty()) {
          return;
        }
      }
    }
  }
  if (std::any_of(m.fibers.begin(), m.fibers.begin() + m.threads,
                  [](const Fiber& fiber) { return fiber.state != Fiber::kExited; })) {
    m.failure = report(deadlock());
  }
}

// ---- streams: calls from different operating-system threads take turns, a block each ------------

struct Streams {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::thread::id, int> of_thread;
  std::vector<bool> live;
  int turn = 0;

  int mine() {
    const auto found = of_thread.find(std::this_thread::get_id());
    return found == of_thread.end() ? 0 : found->second;
  }

  void pass_on() {
    for (size_t i = 0; i < live.size(); ++i) {
      turn = (turn + 1) % static_cast<int>(live.size());
      if (live[turn]) {
        break;
      }
    }
    changed.notify_all();
  }

  void await_turn(std::unique_lock<std::mutex>& lock) {
    if (!live.empty()) {
      changed.wait(lock, [this, me = mine()] { return turn == me; });
    }
  }
} streams;

void take_turns() {
  std::unique_lock<std::mutex> lock(streams.mutex);
  if (!streams.live.empty()) {
    streams.pass_on();
    streams.await_turn(lock);
  }
}

std::map<Kernel, int> dynamic_shared_limits;

// The bytes of this library's thread-local variables: shared variables, and nothing else.
Region find_shared_variables() {
  Region region;
  volatile unsigned char touch =
      focalops::dynamic_shared_memory[0];  // or this thread may not have them yet
  (void)touch;
  const auto find = [](dl_phdr_info* info, size_t, void* out) {
    const auto here = reinterpret_cast<uintptr_t>(&find_shared_variables);
    bool is_mine = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      is_mine |=
          header.p_type == PT_LOAD && here - (info->dlpi_addr + header.p_vaddr) < header.p_memsz;
      size = header.p_type == PT_TLS ? header.p_memsz : size;
    }
    if (is_mine) {
      *static_cast<Region*>(out) = {reinterpret_cast<uintptr_t>(info->dlpi_tls_data), size};
    }
    return static_cast<int>(is_mine);
  };
  dl_iterate_phdr(find, &region);
  return region;
}

void run_block_elsewhere() {
  try {
    executor->run_block(scheduling.order, machine().random);
  } catch (const std::exception& error) {
    machine().failure = error.what();
  }
  running.is_kernel = running.is_watched = false;
}

}  // namespace

Region shared_variables() { return machine().shared; }
Region stacks() {
  return {reinterpret_cast<uintptr_t>(machine().stack), kMaxThreads * kStackBytes};
}
Region dynamic_shared_rest() {
  if (executor != nullptr) {
    return {};
  }
  const size_t used = machine().dynamic_bytes;
  return {reinterpret_cast<uintptr_t>(focalops::dynamic_shared_memory) + used,
          kSharedPerBlockOptin - used};
}

std::string thread_name(uint32_t thread, uint64_t block) {
  return "thread " + triple(thread, now.block_dim) + " of " + block_name(block);
}

std::string source_of(const void* code, bool name) {
  Dl_info info;
  if (dladdr(code, &info) == 0) {
    return "?";
  }
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  std::ostringstream command;
  // Without LD_PRELOAD, which may hold a sanitizer.
  command << "LD_PRELOAD= addr2line -Cfe '" << info.dli_fname << "' 0x" << std::hex
          << (name ? offset : offset - 1);
  std::string lines[2];
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char buffer[4096];
    for (auto& line : lines) {
      if (fgets(buffer, sizeof buffer, pipe)) {
        line = std::string(buffer, strcspn(buffer, "\n"));
      }
    }
    pclose(pipe);
  }
  return name ? lines[0] : lines[1].substr(0, lines[1].find(' '));
}

void fail(const std::string& what) {
  const Unwatched unwatched;
  if (executor != nullptr) {
    throw std::runtime_error(report(what));
  }
  machine().failure = report(what);
  wait();
  std::abort();  // a thread that failed is never resumed
}

void fail_at_code(const std::string& what, const void* code) {
  fail(what + ", at " + (executor != nullptr ? executor->source_of(code) : source_of(code, false)));
}

void fail_at_place(const std::string& what, const Place& place) {
  fail(std::string(place.what) + " " + what + ", at " + place.file + ":" +
       std::to_string(place.line));
}

unsigned lane() { return running.thread % kWarp; }
void fence() { running.fenced = true; }

int count_at_block_barrier(bool predicate, const Place& place) {
  const Unwatched unwatched;
  Fiber& fiber = *machine().current;
  fiber.state = Fiber::kAtBlockBarrier;
  fiber.place = place;
  fiber.predicate = predicate;
  if (!release_block()) {
    wait();
  }
  running.clock = fiber.self.clock;
  running.segment = 0;
  return fiber.count;
}

Lanes meet_in_warp(unsigned mask, uint64_t value, const Place& place, bool orders_memory) {
  const Unwatched unwatched;
  Fiber& fiber = *machine().current;
  fiber.state = Fiber::kInWarp;
  fiber.place = place;
  fiber.mask = mask;
  fiber.value = value;
  fiber.orders_memory = orders_memory;
  fiber.self = running;
  if (!(mask >> lane() & 1u)) {
    std::ostringstream text;
    text << "is called by lane " << lane() << ", which is not in the mask 0x" << std::hex << mask;
    fail_at_place(text.str(), place);
  }
  const Machine& m = machine();
  const int begin = warp_begin(fiber), end = std::min(begin + kWarp, m.threads);
  for (int i = begin; i < end; ++i) {
    const Fiber& other = m.fibers[i];
    if (other.state == Fiber::kInWarp && other.mask != mask && same_place(other.place, place) &&
        (mask >> (i - begin) & 1u || other.mask >> lane() & 1u)) {
      std::ostringstream text;  // not before: it takes longer than all the rest
      text << "gets different masks: 0x" << std::hex << mask << " from lane " << std::dec << lane()
           << ", 0x" << std::hex << other.mask << " from lane " << std::dec << i - begin;
      fail_at_place(text.str(), place);
    }
  }
  if (!release_warp(fiber)) {
    wait();
  }
  running.clock = fiber.self.clock;
  running.segment = fiber.self.segment;
  return fiber.lanes;
}

cudaError_t allow_dynamic_shared(Kernel kernel, int bytes) {
  if (bytes > kSharedPerBlockOptin) {
    return cudaErrorInvalidValue;
  }
  dynamic_shared_limits[kernel] = bytes;
  return cudaSuccess;
}

bool has_kernel_images = true;

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = extent.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedPerBlockOptin;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

void launch(const cudaLaunchConfig_t& config, Kernel kernel, const std::vector<Argument>& arguments,
            const std::function<void()>& thread) {
  Machine& m = machine();
  const auto limit = dynamic_shared_limits.find(kernel);
  if (config.dynamicSmemBytes >
      static_cast<size_t>(limit == dynamic_shared_limits.end() ? kSharedPerBlock : limit->second)) {
    throw std::runtime_error(
        "CUDA emulation: more dynamic shared memory than the kernel was allowed");
  }
  take_turns();
  const dim3 grid = config.gridDim;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(std::min(count, extent.last_blocks));
  std::iota(order.begin(), order.end(), count - order.size());
  if (scheduling.order == kDescending) {
    std::reverse(order.begin(), order.end());
  } else if (scheduling.order == kShuffled) {
    m.random.seed(scheduling.seed);
    std::shuffle(order.begin(), order.end(), m.random);
  }
  const Region shared = executor != nullptr ? executor->begin_launch(config, kernel, arguments)
                                            : find_shared_variables();
  const int id = begin_launch(streams.mine());
  std::string failure;
  for (const uint64_t block : order) {
    m.threads = static_cast<int>(config.blockDim.x * config.blockDim.y * config.blockDim.z);
    m.body = &thread;
    m.kernel = kernel;
    m.dynamic_bytes = config.dynamicSmemBytes;
    m.shared = shared;
    now.block_dim = config.blockDim;
    now.grid_dim = grid;
    now.block = {static_cast<unsigned>(block % grid.x),
                 static_cast<unsigned>(block / grid.x % grid.y),
                 static_cast<unsigned>(block / grid.x / grid.y)};
    running.block = block;
    begin_block(id);
    if (executor != nullptr) {
      run_block_elsewhere();
    } else {
      run_block();
    }
    if (!m.failure.empty()) {
      failure.swap(m.failure);
      for (Fiber& fiber : m.fibers) {
        fiber.started = false;  // what its stack holds is abandoned
      }
      __asan_unpoison_memory_region(m.stack, kMaxThreads * kStackBytes);
      break;
    }
    take_turns();
  }
  end_launch(id);
  if (!failure.empty()) {
    throw std::runtime_error(failure);
  }
}

}  // namespace emulation

// ---- what Python calls --------------------------------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

// For the next call of an op.
EXPORT void focalops_emulation_set_order(int order, unsigned seed) {
  emulation::forget_allocations();
  emulation::scheduling = {static_cast<emulation::Order>(order), seed};
}

// A device of so many multiprocessors, which runs only the last blocks of a launch.
EXPORT void focalops_emulation_set_extent(int multiprocessors, uint64_t last_blocks) {
  emulation::extent = {multiprocessors, last_blocks};
}

EXPORT void focalops_emulation_set_kernel_images(bool has) { emulation::has_kernel_images = has; }

// `count` threads that each begin and end a stream take turns in between, from the first on.
EXPORT void focalops_emulation_expect_streams(int count) {
  using emulation::streams;
  streams.of_thread.clear();
  streams.live.assign(count, true);
  streams.turn = 0;
}

EXPORT void focalops_emulation_begin_stream(int stream) {
  using emulation::streams;
  std::unique_lock<std::mutex> lock(streams.mutex);
  streams.of_thread[std::this_thread::get_id()] = stream;
  streams.await_turn(lock);
}

EXPORT void focalops_emulation_end_stream(int stream) {
  using emulation::streams;
  std::unique_lock<std::mutex> lock(streams.mutex);
  streams.live[stream] = false;
  if (std::find(streams.live.begin(), streams.live.end(), true) == streams.live.end()) {
    streams.live.clear();
  }
  streams.pass_on();
}
