// PTX as this directory executes it: a kernel is a list of decoded instructions, whose registers
// hold a value for each lane of a warp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
using Lanes = std::array<uint64_t, kLanes>;  // a register: the value of lane i in the low bits
using Mask = uint32_t;                       // a set of lanes

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

enum class Kind : uint8_t {
  kPlain,         // each lane for itself
  kBranch,        //
  kExit,          //
  kBlockBarrier,  // waits for the threads of the block
  kMeeting,       // waits for the lanes of a mask
};

// What the threads of a block barrier get of their votes.
enum class Votes : uint8_t { kCount, kAny, kAll };

// An index of a register, or, below 0, the complement of an index of a constant.
using Operand = int;
constexpr Operand kNone = INT32_MIN;

struct Instruction {
  Handler run = nullptr;
  Kind kind = Kind::kPlain;
  Votes votes = Votes::kCount;
  bool guard_negated = false;
  uint8_t width = 1;        // of a vector in memory
  Operand guard = kNone;    // @p
  Operand members = kNone;  // of a meeting: its mask
  int target = -1;          // of a branch
  int64_t offset = 0;       // of an address
  std::array<Operand, 4> to{kNone, kNone, kNone, kNone};
  std::array<Operand, 4> from{kNone, kNone, kNone, kNone};
  int text = 0;                   // its first character in the file
  int line = 0;                   // of the file
  int file = 0, source_line = 0;  // where it comes from, 0: unknown
};

// The special registers, which a warp gets when it starts.
enum Special {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kSpecials
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Lanes> constants;
  int registers = 0;
  std::array<Operand, kSpecials> special;  // kNone: not asked for
  struct Parameter {
    size_t at, size;
  };
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0, static_shared = 0, dynamic_shared_at = 0, local_bytes = 0;
  unsigned max_threads = 1024;
  std::vector<uint64_t> executed;  // by instruction: how often, by warps
};

// A file of nvcc's. Its kernels are decoded when they are first asked for.
class Module {
 public:
  explicit Module(std::string text, std::string name = "PTX");
  const std::vector<std::string>& kernels() const { return names_; }  // as in `canonical_name`
  bool has(const std::string& kernel) const { return entries_.count(kernel) != 0; }
  Kernel& kernel(const std::string& name);
  // Decoded already, or null.
  const Kernel* decoded(const std::string& name) const;
  bool has_variable_at(uint64_t address, size_t size) const;
  std::string_view text(const Instruction& instruction) const;
  std::string source(const Instruction& instruction) const;  // such as csrc/cuda/nms.cu:160

  struct Entry {
    size_t begin, end;
  };
  struct Variable {
    size_t size = 0, alignment = 1;
    bool is_shared = false;
    std::vector<unsigned char> initial;
  };

 private:
  friend class Decoder;
  std::string text_, name_;
  std::vector<std::string> names_;
  std::unordered_map<std::string, Entry> entries_;
  std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels_;
  std::map<std::string, Variable, std::less<>> variables_;
  std::map<std::string, std::unique_ptr<unsigned char[]>, std::less<>>
      memory_;  // of .global, .const
  std::map<int, std::string> files_;
};

void decode(Module& module, Kernel& kernel, const Module::Entry& entry);

// What one instruction does; null where it is unknown.
struct Operation {
  Handler run = nullptr;
  Kind kind = Kind::kPlain;
  int members = -1;             // of a meeting: which operand is the mask
  Votes votes = Votes::kCount;  // of a block barrier
};
const Operation* find_operation(std::string_view name);
// Handlers of `mov` that pack or unpack a vector of `parts` values.
Handler packing(size_t bytes, size_t parts);
Handler unpacking(size_t bytes, size_t parts);

// A kernel's name as every compiler would demangle it, up to its parameters.
std::string canonical_name(const std::string& mangled);

[[noreturn]] void fail(const std::string& what);

// ---- values -------------------------------------------------------------------------------------

template <class T>
T value_of(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

}  // namespace ptx
