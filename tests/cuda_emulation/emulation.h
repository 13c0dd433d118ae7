// What the scheduler of threads (emulation.cpp) and the watch over their memory accesses
// (memory.cpp) know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

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

// memory.cpp
int begin_launch(int stream);
void begin_block(int launch);
void end_launch(int launch);

std::string thread_name(uint32_t thread, uint64_t block);
[[noreturn]] void fail_at_code(const std::string& what, const void* code);
std::string source_of(const void* code, bool name);  // file and line, or the function's name

}  // namespace emulation
