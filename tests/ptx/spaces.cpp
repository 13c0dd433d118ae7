// Loads, stores and atomics. Each access is checked - its alignment, the memory that it may reach -
// and then watched for races, and for shared memory that nobody wrote, as the emulation's are.
#include "operations.h"

namespace ptx {

namespace {

using namespace types;

enum class Space { kParameter, kGlobal, kShared, kLocal, kGeneric };

// Where shared and local memory lie in generic addresses; no host pointer looks like these.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kLocalWindow = uint64_t{1} << 61;
constexpr uint64_t kWindowSize = uint64_t{1} << 32;

std::string hexadecimal(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

struct Access {
  Warp& warp;
  const Instruction& instruction;
  int lane;
  size_t size;
  emulation::AccessKind kind;

  [[noreturn]] void refuse(const std::string& what) const {
    fail_at(warp, instruction, lane, what);
  }

  unsigned char* inside(std::vector<unsigned char>& memory, uint64_t begin, uint64_t bytes,
                        uint64_t address, const char* name) const {
    if (address > bytes || bytes - address < size) {
      refuse("access to " + std::to_string(size) + " bytes at " + hexadecimal(address) +
             ", beyond the " + name + " memory of " + std::to_string(bytes) + " bytes");
    }
    return memory.data() + begin + address;
  }

  unsigned char* watched(unsigned char* memory) const {
    emulation::Running& watch = warp.watch[lane];
    emulation::running = watch;
    emulation::running.accesses = 0;
    emulation::watch_access(reinterpret_cast<uintptr_t>(memory), size, kind, &instruction);
    watch = emulation::running;
    return memory;
  }

  unsigned char* global(uint64_t address) const {
    auto* const memory = reinterpret_cast<unsigned char*>(address);
    if (!emulation::is_allocated(address, size) &&
        !warp.block->module->has_variable_at(address, size)) {
      refuse("access to " + std::to_string(size) + " bytes at " + hexadecimal(address) +
             ", outside all tensors that the op was given or allocated");
    }
    return watched(memory);
  }

  unsigned char* memory(Space space, uint64_t address) const {
    if (address % size != 0) {
      refuse("misaligned access to " + std::to_string(size) + " bytes at " + hexadecimal(address));
    }
    Block& block = *warp.block;
    switch (space) {
      case Space::kParameter:
        return inside(block.parameters, 0, block.parameters.size(), address, "parameter");
      case Space::kShared:
        return watched(inside(block.shared, 0, block.shared.size(), address, "shared"));
      case Space::kLocal: {
        const size_t bytes = block.kernel->local_bytes;
        return inside(warp.local, lane * bytes, bytes, address, "local");
      }
      case Space::kGeneric:
        if (address - kSharedWindow < kWindowSize) {
          return memory(Space::kShared, address - kSharedWindow);
        }
        if (address - kLocalWindow < kWindowSize) {
          return memory(Space::kLocal, address - kLocalWindow);
        }
        return global(address);
      case Space::kGlobal:
        return global(address);
    }
    return nullptr;
  }
};

template <Space S>
unsigned char* memory_of(Warp& warp, const Instruction& i, int lane, uint64_t base, size_t size,
                         emulation::AccessKind kind) {
  return Access{warp, i, lane, size, kind}.memory(S, base + static_cast<uint64_t>(i.offset));
}

template <Space S, class T, bool Volatile>
void load(Warp& warp, const Instruction& i, Mask lanes) {
  const Lanes base =
      *reinterpret_cast<const Lanes*>(warp.from(i.from[0]));  // it may be overwritten
  for_lanes(lanes, [&](int lane) {
    const unsigned char* const memory =
        memory_of<S>(warp, i, lane, base[lane], sizeof(T) * i.width,
                     Volatile ? emulation::kAtomic : emulation::kRead);
    for (int k = 0; k < i.width; ++k) {
      T value;
      std::memcpy(&value, memory + k * sizeof(T), sizeof(T));
      warp.to(i.to[k])[lane] = to_register(value);
    }
  });
}

template <Space S, class T, bool Volatile>
void store(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t* const base = warp.from(i.from[0]);
  for_lanes(lanes, [&](int lane) {
    unsigned char* const memory = memory_of<S>(warp, i, lane, base[lane], sizeof(T) * i.width,
                                               Volatile ? emulation::kAtomic : emulation::kWrite);
    for (int k = 0; k < i.width; ++k) {
      const T value = value_of<T>(warp.from(i.to[k])[lane]);
      std::memcpy(memory + k * sizeof(T), &value, sizeof(T));
    }
  });
}

template <Space S, class T, auto F>
void change(Warp& warp, const Instruction& i, Mask lanes) {
  const Lanes base = *reinterpret_cast<const Lanes*>(warp.from(i.from[0]));
  const Lanes operand = *reinterpret_cast<const Lanes*>(warp.from(i.from[1]));
  const uint64_t* const third = i.from[2] == kNone ? operand.data() : warp.from(i.from[2]);
  for_lanes(lanes, [&](int lane) {
    unsigned char* const memory =
        memory_of<S>(warp, i, lane, base[lane], sizeof(T), emulation::kAtomic);
    T old;
    std::memcpy(&old, memory, sizeof old);
    const T now = F(old, value_of<T>(operand[lane]), value_of<T>(third[lane]));
    std::memcpy(memory, &now, sizeof now);
    warp.to(i.to[0])[lane] = to_register(old);
  });
}

template <Space S, class T>
void add_accesses(Table& t, const std::string& type) {
  static const std::map<Space, std::string> kNames = {{Space::kParameter, ".param"},
                                                      {Space::kGlobal, ".global"},
                                                      {Space::kShared, ".shared"},
                                                      {Space::kLocal, ".local"},
                                                      {Space::kGeneric, ""}};
  const std::string name = kNames.at(S) + type;
  t["ld" + name] = {&load<S, T, false>};
  if constexpr (S == Space::kGlobal) {
    t["ld.const" + type] = t["ldu" + name] = t["ld" + name];
  }
  if constexpr (S != Space::kParameter) {
    t["st" + name] = {&store<S, T, false>};
    t["ld.volatile" + name] = {&load<S, T, true>};
    t["st.volatile" + name] = {&store<S, T, true>};
  }
}

template <class T>
void add_type(Table& t, const std::string& type) {
  add_accesses<Space::kParameter, T>(t, type);
  add_accesses<Space::kGlobal, T>(t, type);
  add_accesses<Space::kShared, T>(t, type);
  add_accesses<Space::kLocal, T>(t, type);
  add_accesses<Space::kGeneric, T>(t, type);
}

template <Space S, class T>
void add_atomics(Table& t, const std::string& space, const std::string& type) {
  const auto add = [&](const char* name, Handler handler) {
    t["atom" + space + "." + name + type] = {handler};
  };
  using U = std::make_unsigned_t<T>;
  add("add", &change<S, T, [](T a, T b, T) -> T { return static_cast<T>(U(a) + U(b)); }>);
  add("min", &change<S, T, [](T a, T b, T) -> T { return least(a, b); }>);
  add("max", &change<S, T, [](T a, T b, T) -> T { return greatest(a, b); }>);
  add("inc", &change<S, T, [](T a, T b, T) -> T { return a >= b ? T(0) : static_cast<T>(a + 1); }>);
  if constexpr (std::is_unsigned_v<T>) {
    const std::string bits = ".b" + std::to_string(8 * sizeof(T));
    const auto add_bits = [&](const char* name, Handler handler) {
      t["atom" + space + "." + name + bits] = {handler};
    };
    add_bits("and", &change<S, T, [](T a, T b, T) -> T { return a & b; }>);
    add_bits("or", &change<S, T, [](T a, T b, T) -> T { return a | b; }>);
    add_bits("xor", &change<S, T, [](T a, T b, T) -> T { return a ^ b; }>);
    add_bits("exch", &change<S, T, [](T, T b, T) -> T { return b; }>);
    add_bits("cas", &change<S, T, [](T a, T b, T c) -> T { return a == b ? c : a; }>);
  }
}

template <Space S>
void add_atomics_of_space(Table& t, const std::string& space) {
  add_atomics<S, u32>(t, space, ".u32");
  add_atomics<S, u64>(t, space, ".u64");
  add_atomics<S, s32>(t, space, ".s32");
  add_atomics<S, s64>(t, space, ".s64");
}

void fence(Warp& warp, const Instruction&, Mask lanes) {
  for_lanes(lanes, [&](int lane) { warp.watch[lane].fenced = true; });
}

template <size_t Bytes, size_t Parts>
void pack(Warp& warp, const Instruction& i, Mask lanes) {
  constexpr int kBits = 8 * Bytes / Parts;
  constexpr uint64_t kOnes = ~uint64_t{0} >> (64 - kBits);
  uint64_t* const to = warp.to(i.to[0]);
  for_lanes(lanes, [&](int lane) {
    uint64_t value = 0;
    for (size_t k = 0; k < Parts; ++k) {
      value |= (warp.from(i.from[k])[lane] & kOnes) << kBits * k;
    }
    to[lane] = value;
  });
}

template <size_t Bytes, size_t Parts>
void unpack(Warp& warp, const Instruction& i, Mask lanes) {
  constexpr int kBits = 8 * Bytes / Parts;
  constexpr uint64_t kOnes = ~uint64_t{0} >> (64 - kBits);
  const Lanes value = *reinterpret_cast<const Lanes*>(warp.from(i.from[0]));
  for_lanes(lanes, [&](int lane) {
    for (size_t k = 0; k < Parts; ++k) {
      warp.to(i.to[k])[lane] = value[lane] >> kBits * k & kOnes;
    }
  });
}

}  // namespace

Handler packing(size_t bytes, size_t parts) {
  return bytes == 8 ? (parts == 2 ? &pack<8, 2> : &pack<8, 4>)
                    : (parts == 2 ? &pack<4, 2> : &pack<4, 4>);
}
Handler unpacking(size_t bytes, size_t parts) {
  return bytes == 8 ? (parts == 2 ? &unpack<8, 2> : &unpack<8, 4>)
                    : (parts == 2 ? &unpack<4, 2> : &unpack<4, 4>);
}

void add_memory(Table& t) {
  for_integers([&]<class T>(T, const std::string& type) {
    add_type<T>(t, type);
    if constexpr (std::is_unsigned_v<T>) {
      add_type<T>(t, ".b" + type.substr(2));
    }
  });
  add_type<f32>(t, ".f32");
  add_type<f64>(t, ".f64");
  add_atomics_of_space<Space::kGlobal>(t, ".global");
  add_atomics_of_space<Space::kShared>(t, ".shared");
  add_atomics_of_space<Space::kGeneric>(t, "");
  for (const char* name : {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.sc.gpu",
                           "fence.acq_rel.sys", "fence.sc.sys"}) {
    t[name] = {&fence};
  }
  // Within the block barriers order memory, and nothing else does.
  for (const char* name : {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta"}) {
    t[name] = {[](Warp&, const Instruction&, Mask) {}};
  }
  t["cvta.to.global.u64"] = t["cvta.global.u64"] = t["cvta.to.const.u64"] = t["cvta.const.u64"] =
      per_lane<[](u64 a) { return a; }>();
  t["cvta.shared.u64"] = per_lane<[](u64 a) { return a + kSharedWindow; }>();
  t["cvta.to.shared.u64"] = per_lane<[](u64 a) { return a - kSharedWindow; }>();
  t["cvta.local.u64"] = per_lane<[](u64 a) { return a + kLocalWindow; }>();
  t["cvta.to.local.u64"] = per_lane<[](u64 a) { return a - kLocalWindow; }>();
}

}  // namespace ptx
