// What the scheduler of threads (emulation.cpp) and the watch over their memory accesses
// (memory.cpp) know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

// Threads are ordered by barriers: two accesses of one block are ordered if a __syncthreads,
// counted by `block_barriers`, or between threads of a warp a __syncwarp, counted by
// `warp_barriers`, lies between them.
struct Clock {
  uint32_t block_barriers = 0;
  uint32_t warp_barriers = 0;
};

struct Running {
  bool is_kernel = false;
  bool is_watched = false;  // kernel code, neither the host's nor the emulation's own
  uint32_t thread = 0;      // in the block
  uint64_t block = 0;       // in the grid
  Clock clock;
  uint32_t segment = 0;   // of memory.cpp: this thread from one barrier to the next
  bool fenced = false;    // a __threadfence since its last plain write
  uint32_t accesses = 0;  // since its last switch
};
extern Running running;

// The emulation itself is not instrumented, but may share a template's code with a kernel file that
// is.
class Unwatched {
 public:
  Unwatched() { running.is_watched = false; }
  ~Unwatched() { running.is_watched = running.is_kernel; }
};

struct Region {
  uintptr_t begin = 0;
  size_t size = 0;
  bool contains(uintptr_t address) const { return address - begin < size; }
};

Region shared_variables();     // those of the calling operating-system thread
Region stacks();               // of the emulated threads: nobody else's business
Region dynamic_shared_rest();  // what the launch did not ask for

// What runs a kernel's blocks in place of the host compiler's code: tests/ptx. What goes wrong it
// throws, or hands to fail(), which throws too while an executor is there.
class Executor {
 public:
  virtual ~Executor() = default;
  // Returns the memory that will be the shared one of each block.
  virtual Region begin_launch(const cudaLaunchConfig_t& config, Kernel kernel,
                              const std::vector<Argument>& arguments) = 0;
  virtual void run_block(int order, std::mt19937& random) = 0;
  virtual std::string source_of(const void* instruction) = 0;
};
extern Executor* executor;  // null: the host compiler's code

// memory.cpp
enum AccessKind { kRead = 0, kWrite = 1, kAtomic = 2 };
void watch_access(uintptr_t address, size_t size, AccessKind kind, const void* code);
// What an executor's kernels may access: the tensors whose pointers an op has taken.
void allow_access(const void* begin, size_t size);
void forget_allocations();
bool is_allocated(uintptr_t address, size_t size);
int begin_launch(int stream);
void begin_block(int launch);
void end_launch(int launch);

std::string thread_name(uint32_t thread, uint64_t block);
[[noreturn]] void fail_at_code(const std::string& what, const void* code);
std::string source_of(const void* code, bool name);  // file and line, or the function's name

}  // namespace emulation
