// A block of threads while it runs.
#pragma once

#include <random>

#include "../cuda_emulation/emulation.h"
#include "program.h"

namespace ptx {

struct Block {
  Module* module = nullptr;
  Kernel* kernel = nullptr;
  std::vector<unsigned char> parameters;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  dim3 dim, grid;
  uint64_t steps = 0;  // left, before it is said not to end
};

struct Warp {
  Block* block = nullptr;
  int number = 0;
  Mask live = 0;        // have not exited
  Mask at_barrier = 0;  // wait for the block
  Mask at_meeting = 0;  // wait for lanes of the warp
  std::array<int, kLanes> pc{};
  uint32_t choices = 0;  // between lanes that parted
  std::vector<Lanes> registers;
  std::vector<unsigned char> local;  // of lane 0, then lane 1, ...
  std::array<emulation::Running, kLanes> watch{};

  uint64_t* to(Operand operand) { return registers[operand].data(); }
  const uint64_t* from(Operand operand) {
    return operand >= 0 ? registers[operand].data() : block->kernel->constants[~operand].data();
  }
};

// Runs a block to its end: warps ascending, descending or shuffled, and lanes that went different
// ways likewise. Throws what a GPU would not do, or leaves undefined.
void run_block(Block& block, int order, std::mt19937& random);

// Reports it with the instruction and the thread.
[[noreturn]] void fail_at(Warp& warp, const Instruction& instruction, int lane,
                          const std::string& what);

template <class F>
inline void for_lanes(Mask mask, F f) {
  if (mask == ~Mask{0}) {
    for (int lane = 0; lane < kLanes; ++lane) {
      f(lane);
    }
    return;
  }
  for (; mask != 0; mask &= mask - 1) {
    f(__builtin_ctz(mask));
  }
}

// How far from exact the approximate instructions are, as a function of seed and operand: 0 is
// rounded to nearest, 1 and 2 are as low and as high as the manual allows, others choose one of
// these two by a hash of the operand.
void set_approximation(uint64_t seed);

}  // namespace ptx
