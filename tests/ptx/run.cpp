// Warps and blocks. A lane has a program counter of its own, as since Volta; lanes at the same
// instruction run it together. Which of those that parted goes first is a question of the order,
// which a kernel must not depend on.
#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>

#include "machine.h"

namespace ptx {

namespace {

constexpr uint64_t kMostSteps = uint64_t{1} << 23;  // of a warp: more is an endless loop

std::string place(const Block& block, const Instruction& i) {
  return "`" + std::string(block.module->text(i)) + "`, " + block.module->source(i);
}

Mask guarded(Warp& warp, const Instruction& i, Mask lanes) {
  if (i.guard == kNone) {
    return lanes;
  }
  const uint64_t* const guard = warp.from(i.guard);
  Mask active = 0;
  for_lanes(lanes, [&](int lane) {
    active |= static_cast<Mask>((guard[lane] & 1) != i.guard_negated) << lane;
  });
  return active;
}

Mask mask_of(Warp& warp, const Instruction& i, int lane) {
  return static_cast<Mask>(warp.from(i.members)[lane]);
}

// Runs the instruction between lanes once all of its mask that have not exited are there.
void meet(Warp& warp, const Instruction& i, int pc, Mask arriving) {
  warp.at_meeting |= arriving;
  const Mask members = mask_of(warp, i, __builtin_ctz(arriving));
  Mask present = 0;
  for_lanes(warp.at_meeting, [&](int lane) {
    const bool is_here = warp.pc[lane] == pc;
    if (is_here && !(mask_of(warp, i, lane) >> lane & 1)) {
      fail_at(warp, i, lane, "the lane is not in its mask");
    }
    if (is_here && members >> lane & 1) {
      if (mask_of(warp, i, lane) != members) {
        fail_at(warp, i, lane, "lanes bring different masks");
      }
      present |= Mask{1} << lane;
    }
  });
  if ((members & warp.live & ~present) == 0) {
    i.run(warp, i, present);
    for_lanes(present, [&](int lane) { warp.pc[lane] = pc + 1; });
    warp.at_meeting &= ~present;
  }
}

// Runs `lanes`, all of which are at `pc`, until they part, wait, or reach `limit`; `alone`: no
// other lane could go on.
void step(Warp& warp, Mask lanes, int pc, int limit, bool alone) {
  Block& block = *warp.block;
  const Instruction* const code = block.kernel->code.data();
  uint64_t* const executed = block.kernel->executed.data();
  const auto move = [&](Mask moved, int to) {
    for_lanes(moved, [&](int lane) { warp.pc[lane] = to; });
  };
  for (; pc != limit; ++pc) {
    const Instruction& i = code[pc];
    if (--block.steps == 0) {
      fail_at(warp, i, __builtin_ctz(lanes), "the block does not end");
    }
    const Mask active = guarded(warp, i, lanes);
    if (active == 0) {
      continue;
    }
    ++executed[pc];
    switch (i.kind) {
      case Kind::kPlain:
        i.run(warp, i, active);
        break;
      case Kind::kBranch:
        if (alone && active == lanes) {
          pc = i.target - 1;
          break;
        }
        move(lanes & ~active, pc + 1);
        move(active, i.target);
        return;
      case Kind::kExit:
        warp.live &= ~active;
        lanes &= ~active;
        if (lanes == 0) {
          return;
        }
        break;
      case Kind::kBlockBarrier:
        move(lanes & ~active, pc + 1);
        move(active, pc);
        warp.at_barrier |= active;
        return;
      case Kind::kMeeting:
        move(lanes & ~active, pc + 1);
        move(active, pc);
        meet(warp, i, pc, active);
        return;
    }
  }
  move(lanes, limit);
}

// Lanes that wait for some that have exited meanwhile need not wait any longer.
void meet_again(Warp& warp) {
  for (Mask left = warp.at_meeting; left != 0;) {
    const int pc = warp.pc[__builtin_ctz(left)];
    Mask here = 0;
    for_lanes(left, [&](int lane) { here |= static_cast<Mask>(warp.pc[lane] == pc) << lane; });
    left &= ~here;
    meet(warp, warp.block->kernel->code[pc], pc, here);
  }
}

// Which of the lanes that can go on goes first: those furthest behind, so that lanes meet again
// where their ways do, and now and then others, so that none waits for ever.
int choose(Warp& warp, Mask ready, int order, std::mt19937& random) {
  std::array<int, kLanes> places;
  int count = 0;
  for_lanes(ready, [&](int lane) { places[count++] = warp.pc[lane]; });
  const auto [least, greatest] = std::minmax_element(places.begin(), places.begin() + count);
  if (*least == *greatest) {
    return *least;
  }
  ++warp.choices;
  switch (order) {
    case 0:
      return warp.choices % 256 == 0 ? *greatest : *least;
    case 1:
      return warp.choices % 4 == 0 ? *greatest : *least;
    default:
      return random() % 4 == 0 ? places[random() % static_cast<unsigned>(count)] : *least;
  }
}

// Runs a warp as far as it gets.
bool advance(Warp& warp, int order, std::mt19937& random) {
  for (bool progress = false;; progress = true) {
    Mask ready = warp.live & ~warp.at_barrier & ~warp.at_meeting;
    if (ready == 0 && warp.at_meeting != 0) {
      meet_again(warp);
      ready = warp.live & ~warp.at_barrier & ~warp.at_meeting;
    }
    if (ready == 0) {
      return progress;
    }
    const int pc = choose(warp, ready, order, random);
    Mask together = 0;
    int next = std::numeric_limits<int>::max();  // where others are, behind
    for_lanes(ready, [&](int lane) {
      if (warp.pc[lane] == pc) {
        together |= Mask{1} << lane;
      } else if (warp.pc[lane] > pc) {
        next = std::min(next, warp.pc[lane]);
      }
    });
    step(warp, together, pc, next, together == ready);
  }
}

// Releases the threads at the barrier once all that have not exited are there.
bool release(Block& block) {
  Warp* first = nullptr;
  uint64_t count = 0, votes = 0;
  for (Warp& warp : block.warps) {
    if (warp.at_barrier != warp.live) {
      return false;
    }
    if (warp.live == 0) {
      continue;
    }
    first = first == nullptr ? &warp : first;
    const int pc = warp.pc[__builtin_ctz(warp.live)];
    const Instruction& i = block.kernel->code[pc];
    for_lanes(warp.live, [&](int lane) {
      if (warp.pc[lane] != pc) {
        fail_at(warp, i, lane, "threads of a warp wait at two barriers");
      }
      ++count;
      votes += i.from[0] != kNone && (warp.from(i.from[0])[lane] & 1) != 0;
    });
  }
  if (first == nullptr) {
    return false;
  }
  for (Warp& warp : block.warps) {
    for_lanes(warp.live, [&](int lane) {
      const Instruction& i = block.kernel->code[warp.pc[lane]++];
      if (i.to[0] != kNone) {
        warp.to(i.to[0])[lane] = i.votes == Votes::kAll   ? votes == count
                                 : i.votes == Votes::kAny ? votes > 0
                                                          : votes;
      }
      emulation::Running& watch = warp.watch[lane];
      watch.clock = {watch.clock.block_barriers + 1, 0};
      watch.segment = 0;
    });
    warp.at_barrier = 0;
  }
  return true;
}

// Who waits where, a line for neighbours that wait alike.
[[noreturn]] void fail_waiting(Block& block) {
  std::ostringstream out;
  out << "threads wait for each other";
  std::string before;
  for (Warp& warp : block.warps) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int thread = warp.number * kLanes + lane;
      if (thread >= static_cast<int>(block.dim.x * block.dim.y * block.dim.z)) {
        break;
      }
      const bool lives = warp.live >> lane & 1;
      const std::string where =
          lives ? "wait at " + place(block, block.kernel->code[warp.pc[lane]]) : "exited";
      if (where != before) {
        out << "\n  from thread " << thread << " on " << where;
      }
      before = where;
    }
  }
  emulation::fail(out.str());
}

void set_special_registers(Warp& warp) {
  const Block& block = *warp.block;
  for (int s = 0; s < kSpecials; ++s) {
    const Operand operand = block.kernel->special[s];
    for (int lane = 0; operand != kNone && lane < kLanes; ++lane) {
      const unsigned thread = static_cast<unsigned>(warp.number * kLanes + lane);
      const unsigned x = block.dim.x, y = block.dim.y;
      const unsigned values[kSpecials] = {thread % x,
                                          thread / x % y,
                                          thread / x / y,
                                          x,
                                          y,
                                          block.dim.z,
                                          emulation::now.block.x,
                                          emulation::now.block.y,
                                          emulation::now.block.z,
                                          block.grid.x,
                                          block.grid.y,
                                          block.grid.z,
                                          static_cast<unsigned>(lane),
                                          static_cast<unsigned>(warp.number)};
      warp.to(operand)[lane] = values[s];
    }
  }
}

void start(Block& block) {
  const unsigned threads = block.dim.x * block.dim.y * block.dim.z;
  std::fill(block.shared.begin(), block.shared.end(), 0xff);
  block.warps.resize((threads + kLanes - 1) / kLanes);
  block.steps = kMostSteps * block.warps.size();
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const unsigned lanes = std::min<unsigned>(kLanes, threads - static_cast<unsigned>(w) * kLanes);
    warp.block = &block;
    warp.number = static_cast<int>(w);
    warp.live = lanes == kLanes ? ~Mask{0} : (Mask{1} << lanes) - 1;
    warp.at_barrier = warp.at_meeting = 0;
    warp.pc.fill(0);
    warp.registers.resize(static_cast<size_t>(block.kernel->registers));
    warp.local.assign(block.kernel->local_bytes * kLanes, 0xff);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      emulation::Running& watch = warp.watch[lane];
      watch = {};
      watch.is_kernel = watch.is_watched = true;
      watch.thread = static_cast<uint32_t>(w * kLanes + lane);
      watch.block = emulation::running.block;
    }
    set_special_registers(warp);
  }
}

}  // namespace

void fail_at(Warp& warp, const Instruction& i, int lane, const std::string& what) {
  emulation::running = warp.watch[lane];
  emulation::fail(what + ", at " + place(*warp.block, i));
}

void run_block(Block& block, int order, std::mt19937& random) {
  start(block);
  std::vector<int> turns(block.warps.size());
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) {
    std::reverse(turns.begin(), turns.end());
  }
  for (bool progress = true; progress;) {
    if (order == 2) {
      std::shuffle(turns.begin(), turns.end(), random);
    }
    progress = false;
    for (const int turn : turns) {
      progress |= advance(block.warps[turn], order, random);
    }
    progress |= release(block);
  }
  for (const Warp& warp : block.warps) {
    if (warp.live != 0) {
      fail_waiting(block);
    }
  }
}

}  // namespace ptx
