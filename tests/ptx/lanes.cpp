// Votes, shuffles, matches and reductions: what the lanes of a mask do together. `run` calls these
// with the lanes that are there, which are all of the mask that have not exited.
#include "operations.h"

namespace ptx {

namespace {

using namespace types;

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

template <Shuffle Mode>
void shuffle(Warp& warp, const Instruction& i, Mask lanes) {
  const Lanes value = *reinterpret_cast<const Lanes*>(warp.from(i.from[0]));
  const Lanes distance = *reinterpret_cast<const Lanes*>(warp.from(i.from[1]));
  const Lanes bounds = *reinterpret_cast<const Lanes*>(warp.from(i.from[2]));
  for_lanes(lanes, [&](int lane) {
    const int by = distance[lane] & 31, clamp = bounds[lane] & 31, segment = bounds[lane] >> 8 & 31;
    const int first = lane & segment, last = first | (clamp & ~segment);
    int source = 0;
    switch (Mode) {
      case Shuffle::kUp:
        source = lane - by;
        break;
      case Shuffle::kDown:
        source = lane + by;
        break;
      case Shuffle::kButterfly:
        source = lane ^ by;
        break;
      case Shuffle::kIndex:
        source = first | (by & ~segment);
        break;
    }
    const bool is_inside = Mode == Shuffle::kUp ? source >= last : source <= last;
    source = is_inside ? source : lane;
    if (!(lanes >> source & 1)) {
      fail_at(warp, i, lane,
              "reads lane " + std::to_string(source) + ", which takes no part in it");
    }
    warp.to(i.to[0])[lane] = value[source];
    if (i.to[1] != kNone) {
      warp.to(i.to[1])[lane] = is_inside;
    }
  });
}

template <auto F>
void vote(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t* const predicate = warp.from(i.from[0]);
  Mask votes = 0;
  for_lanes(lanes, [&](int lane) { votes |= static_cast<Mask>(predicate[lane] & 1) << lane; });
  const uint64_t result = F(votes, lanes);
  for_lanes(lanes, [&](int lane) { warp.to(i.to[0])[lane] = result; });
}

template <class T, auto F>
void reduce(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t* const from = warp.from(i.from[0]);
  T result = value_of<T>(from[__builtin_ctz(lanes)]);
  for_lanes(lanes & (lanes - 1), [&](int lane) { result = F(result, value_of<T>(from[lane])); });
  for_lanes(lanes, [&](int lane) { warp.to(i.to[0])[lane] = to_register(result); });
}

template <class T>
void match_any(Warp& warp, const Instruction& i, Mask lanes) {
  const Lanes value = *reinterpret_cast<const Lanes*>(warp.from(i.from[0]));
  for_lanes(lanes, [&](int lane) {
    Mask alike = 0;
    for_lanes(lanes, [&](int other) {
      const bool is_alike = value_of<T>(value[other]) == value_of<T>(value[lane]);
      alike |= static_cast<Mask>(is_alike) << other;
    });
    warp.to(i.to[0])[lane] = alike;
  });
}

template <class T>
void match_all(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t* const value = warp.from(i.from[0]);
  bool alike = true;
  for_lanes(lanes, [&](int lane) {
    alike &= value_of<T>(value[lane]) == value_of<T>(value[__builtin_ctz(lanes)]);
  });
  for_lanes(lanes, [&](int lane) {
    warp.to(i.to[0])[lane] = alike ? lanes : 0;
    if (i.to[1] != kNone) {
      warp.to(i.to[1])[lane] = alike;
    }
  });
}

void synchronise(Warp& warp, const Instruction&, Mask lanes) {  // of the warp: it orders memory
  uint32_t clock = 0;
  for_lanes(lanes,
            [&](int lane) { clock = std::max(clock, warp.watch[lane].clock.warp_barriers + 1); });
  for_lanes(lanes, [&](int lane) {
    warp.watch[lane].clock.warp_barriers = clock;
    warp.watch[lane].segment = 0;
  });
}

void nothing(Warp&, const Instruction&, Mask) {}

void trap(Warp& warp, const Instruction& i, Mask lanes) {
  fail_at(warp, i, __builtin_ctz(lanes), "trap");
}

}  // namespace

void add_meetings(Table& t) {
  t["shfl.sync.up.b32"] = {&shuffle<Shuffle::kUp>, Kind::kMeeting, 3};
  t["shfl.sync.down.b32"] = {&shuffle<Shuffle::kDown>, Kind::kMeeting, 3};
  t["shfl.sync.bfly.b32"] = {&shuffle<Shuffle::kButterfly>, Kind::kMeeting, 3};
  t["shfl.sync.idx.b32"] = {&shuffle<Shuffle::kIndex>, Kind::kMeeting, 3};

  const auto add_vote = [&](const char* name, Handler handler) {
    t[name] = {handler, Kind::kMeeting, 1};
  };
  add_vote("vote.sync.ballot.b32", &vote<[](Mask votes, Mask) { return votes; }>);
  add_vote("vote.sync.any.pred", &vote<[](Mask votes, Mask) { return votes != 0; }>);
  add_vote("vote.sync.all.pred", &vote<[](Mask votes, Mask lanes) { return votes == lanes; }>);
  add_vote("vote.sync.uni.pred",
           &vote<[](Mask votes, Mask lanes) { return votes == lanes || votes == 0; }>);

  add_vote("redux.sync.add.u32", &reduce<u32, [](u32 a, u32 b) { return a + b; }>);
  add_vote("redux.sync.add.s32", &reduce<u32, [](u32 a, u32 b) { return a + b; }>);
  add_vote("redux.sync.min.u32", &reduce<u32, [](u32 a, u32 b) { return least(a, b); }>);
  add_vote("redux.sync.max.u32", &reduce<u32, [](u32 a, u32 b) { return greatest(a, b); }>);
  add_vote("redux.sync.min.s32", &reduce<s32, [](s32 a, s32 b) { return least(a, b); }>);
  add_vote("redux.sync.max.s32", &reduce<s32, [](s32 a, s32 b) { return greatest(a, b); }>);
  add_vote("redux.sync.and.b32", &reduce<u32, [](u32 a, u32 b) { return a & b; }>);
  add_vote("redux.sync.or.b32", &reduce<u32, [](u32 a, u32 b) { return a | b; }>);
  add_vote("redux.sync.xor.b32", &reduce<u32, [](u32 a, u32 b) { return a ^ b; }>);

  add_vote("match.any.sync.b32", &match_any<u32>);
  add_vote("match.any.sync.b64", &match_any<u64>);
  add_vote("match.all.sync.b32", &match_all<u32>);
  add_vote("match.all.sync.b64", &match_all<u64>);

  t["bar.warp.sync"] = {&synchronise, Kind::kMeeting, 0};

  // What run.cpp does itself.
  t["bar.sync"] = {&nothing, Kind::kBlockBarrier};
  t["bar.red.popc.u32"] = {&nothing, Kind::kBlockBarrier, -1, Votes::kCount};
  t["bar.red.or.pred"] = {&nothing, Kind::kBlockBarrier, -1, Votes::kAny};
  t["bar.red.and.pred"] = {&nothing, Kind::kBlockBarrier, -1, Votes::kAll};
  t["bra"] = t["bra.uni"] = {&nothing, Kind::kBranch};
  t["ret"] = t["ret.uni"] = t["exit"] = {&nothing, Kind::kExit};
  t["trap"] = {&trap};
}

const Operation* find_operation(std::string_view name) {
  // It is not destroyed: a kernel may still be decoded when the process ends.
  static const Table& table = *new const Table([] {
    Table t;
    add_arithmetic(t);
    add_memory(t);
    add_meetings(t);
    return t;
  }());
  const auto found = table.find(std::string(name));
  return found == table.end() ? nullptr : &found->second;
}

}  // namespace ptx
