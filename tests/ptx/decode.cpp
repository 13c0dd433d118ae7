// The statements of a kernel to instructions.
#include <algorithm>
#include <cstdlib>

#include "text.h"

namespace ptx {

namespace {

const std::map<std::string_view, Special> kSpecialNames = {
    {"%tid.x", kTidX},       {"%tid.y", kTidY},       {"%tid.z", kTidZ},
    {"%ntid.x", kNtidX},     {"%ntid.y", kNtidY},     {"%ntid.z", kNtidZ},
    {"%ctaid.x", kCtaidX},   {"%ctaid.y", kCtaidY},   {"%ctaid.z", kCtaidZ},
    {"%nctaid.x", kNctaidX}, {"%nctaid.y", kNctaidY}, {"%nctaid.z", kNctaidZ},
    {"%laneid", kLaneId},    {"%warpid", kWarpId}};

// What says how a load or store is cached, and changes no value.
bool is_cache_hint(std::string_view modifier) {
  static const std::string_view kHints[] = {"wb", "wt", "nc", "cs", "cg", "ca", "cv", "lu", "weak"};
  return std::find(std::begin(kHints), std::end(kHints), modifier) != std::end(kHints) ||
         modifier.find("::") != std::string_view::npos;
}
bool is_scope(std::string_view modifier) {
  return modifier == "relaxed" || modifier == "gpu" || modifier == "cta" || modifier == "sys";
}

}  // namespace

class Decoder {
 public:
  Decoder(Module& module, Kernel& kernel, const Module::Entry& entry)
      : module_(module), kernel_(kernel), at_(entry.begin), end_(entry.end) {
    kernel_.special.fill(kNone);
    line_ = 1 + static_cast<int>(std::count(module.text_.begin(),
                                            module.text_.begin() + static_cast<long>(at_), '\n'));
  }

  void decode() {
    const std::string_view head(module_.text_.data() + at_, end_ - at_);
    const size_t open = head.find('('), brace = head.find('{');
    const size_t close = head.find(')', open);
    if (open < brace) {
      parameters(head.substr(open + 1, close - open - 1));
    }
    if (const size_t most = head.find(".maxntid"); most < brace) {
      kernel_.max_threads = 1;
      for (const auto part : split(head.substr(most + 8, head.find('\n', most) - most - 8), ',')) {
        kernel_.max_threads *= static_cast<unsigned>(number(part));
      }
    }
    scopes_.emplace_back();
    skip_to(at_ + brace + 1);
    --end_;  // the closing brace
    while (skip_space()) {
      statement();
    }
    append({.run = find_operation("ret")->run, .kind = Kind::kExit});
    link();
  }

 private:
  // ---- statements ----

  void skip_to(size_t at) {
    line_ += static_cast<int>(std::count(module_.text_.begin() + static_cast<long>(at_),
                                         module_.text_.begin() + static_cast<long>(at), '\n'));
    at_ = at;
  }

  // Whitespace and comments; false at the end.
  bool skip_space() {
    const std::string& text = module_.text_;
    while (at_ < end_) {
      if (is_space(text[at_])) {
        skip_to(at_ + 1);
      } else if (text.compare(at_, 2, "//") == 0) {
        skip_to(std::min(end_, text.find('\n', at_)));
      } else {
        return true;
      }
    }
    return false;
  }

  void statement() {
    const std::string& text = module_.text_;
    if (text[at_] == '{') {
      scopes_.emplace_back();
      skip_to(at_ + 1);
      return;
    }
    if (text[at_] == '}') {
      scopes_.pop_back();
      skip_to(at_ + 1);
      return;
    }
    size_t name_end = at_;
    while (name_end < end_ && is_name(text[name_end])) {
      ++name_end;
    }
    if (name_end > at_ && text[name_end] == ':') {
      labels_[text.substr(at_, name_end - at_)] = static_cast<int>(kernel_.code.size());
      skip_to(name_end + 1);
      return;
    }
    const bool is_loc = text.compare(at_, 4, ".loc") == 0 && is_space(text[at_ + 4]);
    const size_t end = text.find(is_loc ? '\n' : ';', at_);
    if (end == std::string::npos || end >= end_) {
      fail("a statement without an end in " + kernel_.name + ": " + text.substr(at_, 80));
    }
    const std::string_view body = trimmed({text.data() + at_, end - at_});
    if (is_loc) {
      location(body.substr(4));
    } else if (body.front() == '.') {
      directive(body);
    } else {
      instruction(body);
    }
    skip_to(end + 1);
  }

  void location(std::string_view text) {  // file line column
    char* rest = nullptr;
    const std::string numbers(text);
    file_ = static_cast<int>(std::strtol(numbers.c_str(), &rest, 10));
    source_line_ = static_cast<int>(std::strtol(rest, nullptr, 10));
  }

  void directive(std::string_view text) {
    const size_t space = text.find_first_of(" \t");
    const std::string_view name = text.substr(0, space);
    if (name == ".reg") {
      registers(trimmed(text.substr(space)));
    } else if (name == ".shared" || name == ".local") {
      const auto [variable_name, variable] = parse_variable(trimmed(text.substr(space)));
      place(variable_name, variable,
            name == ".shared" ? kernel_.static_shared : kernel_.local_bytes);
    } else if (name != ".pragma") {
      fail("unknown directive " + std::string(text));
    }
  }

  void registers(std::string_view text) {  // ".b32 %r<57>" or ".pred p, q"
    text = trimmed(text.substr(text.find_first_of(" \t")));
    for (const std::string_view item : split(text, ',')) {
      const size_t angle = item.find('<');
      const std::string name(item.substr(0, angle));
      if (angle == std::string_view::npos) {
        scopes_.back()[name] = kernel_.registers++;
        continue;
      }
      const uint64_t count = number(item.substr(angle + 1, item.find('>') - angle - 1));
      for (uint64_t i = 0; i < count; ++i) {
        scopes_.back()[name + std::to_string(i)] = kernel_.registers++;
      }
    }
  }

  void place(const std::string& name, const Module::Variable& variable, size_t& bytes) {
    bytes = align(bytes, variable.alignment);
    symbols_[name] = bytes;
    bytes += variable.size;
  }

  void parameters(std::string_view text) {
    size_t at = 0;
    for (const std::string_view item : split(text, ',')) {
      const auto [name, variable] = parse_variable(item);
      at = align(at, variable.alignment);
      symbols_[name] = at;
      kernel_.parameters.push_back({at, variable.size});
      at += variable.size;
    }
    kernel_.parameter_bytes = at;
  }

  // ---- operands ----

  Operand constant(uint64_t bits) {
    const auto [found, is_new] =
        constant_of_.try_emplace(bits, ~static_cast<Operand>(kernel_.constants.size()));
    if (is_new) {
      kernel_.constants.emplace_back().fill(bits);
    }
    return found->second;
  }

  Operand find_register(std::string_view name) {
    const std::string key(name);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(key); found != scope->end()) {
        return found->second;
      }
    }
    if (const auto special = kSpecialNames.find(name); special != kSpecialNames.end()) {
      Operand& operand = kernel_.special[special->second];
      operand = operand == kNone ? kernel_.registers++ : operand;
      return operand;
    }
    return kNone;
  }

  Operand source(std::string_view text) {
    if (const Operand found = find_register(text); found != kNone) {
      return found;
    }
    if (text.empty() || text[0] == '%' || text[0] == '!') {
      fail("unknown operand " + std::string(text) + " in " + std::string(current_));
    }
    return is_digit(text[0]) || text[0] == '-' ? constant(number(text)) : symbol(std::string(text));
  }

  Operand destination(std::string_view text) {
    if (text == "_") {
      return kernel_.registers++;
    }
    const Operand found = find_register(text);
    if (found == kNone) {
      fail("unknown register " + std::string(text) + " in " + std::string(current_));
    }
    return found;
  }

  // The address of a variable, in its own space.
  Operand symbol(const std::string& name) {
    if (const auto found = symbols_.find(name); found != symbols_.end()) {
      return constant(found->second);
    }
    const auto found = module_.variables_.find(name);
    if (found == module_.variables_.end()) {
      fail("unknown symbol " + name);
    }
    const Module::Variable& variable = found->second;
    if (!variable.is_shared) {
      auto& memory = module_.memory_[name];
      if (!memory) {
        memory = std::make_unique<unsigned char[]>(variable.size + 16);
        std::copy(variable.initial.begin(), variable.initial.end(), memory.get());
      }
      return constant(reinterpret_cast<uint64_t>(memory.get()));
    }
    if (variable.size > 0) {
      place(name, variable, kernel_.static_shared);
      return constant(symbols_.at(name));
    }
    if (dynamic_ == kNone) {  // where it lies is known once all others have their place
      dynamic_ = ~static_cast<Operand>(kernel_.constants.size());
      kernel_.constants.emplace_back();
    }
    return dynamic_;
  }

  void address(Instruction& i, std::string_view text) {  // [%rd1+8]
    std::string_view inside = trimmed(text.substr(1, text.size() - 2));
    const size_t sign = inside.find_first_of("+-", 1);
    if (sign != std::string_view::npos) {
      const std::string_view digits = trimmed(inside.substr(sign + 1));
      i.offset = static_cast<int64_t>(number(digits)) * (inside[sign] == '-' ? -1 : 1);
      inside = trimmed(inside.substr(0, sign));
    }
    i.from[0] = source(inside);
  }

  // ---- instructions ----

  void append(Instruction i) {
    i.text = static_cast<int>(at_);
    i.line = line_;
    i.file = file_;
    i.source_line = source_line_;
    kernel_.code.push_back(i);
  }

  void instruction(std::string_view text) {
    current_ = text;
    Instruction i;
    if (text[0] == '@') {
      const size_t space = text.find_first_of(" \t");
      i.guard_negated = text[1] == '!';
      i.guard = source(text.substr(i.guard_negated ? 2 : 1, space - (i.guard_negated ? 2 : 1)));
      text = trimmed(text.substr(space));
    }
    const size_t space = text.find_first_of(" \t");
    std::string name(text.substr(0, space));
    const auto operands = split(space == std::string_view::npos ? "" : text.substr(space), ',');

    const bool is_move = name == "mov.b64" || name == "mov.b32";
    if (is_move && operands.size() == 2 && (operands[0][0] == '{' || operands[1][0] == '{')) {
      return move_vector(i, operands, name == "mov.b64" ? 8 : 4);
    }
    const std::string family = name.substr(0, name.find('.'));
    const bool is_load = family == "ld" || family == "ldu", is_store = family == "st";
    const bool is_atomic = family == "atom" || family == "red";
    if (is_load || is_store || is_atomic) {
      name = plain_name(name, i);
    }
    const Operation* const operation = find_operation(name);
    if (operation == nullptr) {
      fail("unknown instruction `" + std::string(current_) + "` in " + kernel_.name + ", line " +
           std::to_string(line_));
    }
    i.run = operation->run;
    i.kind = operation->kind;
    i.votes = operation->votes;
    if (i.kind == Kind::kBranch) {
      branches_.emplace_back(kernel_.code.size(), std::string(operands.at(0)));
    } else if (is_load) {
      vector(i.to, members_of(operands.at(0)), true);
      address(i, operands.at(1));
    } else if (is_store) {
      address(i, operands.at(0));
      vector(i.to, members_of(operands.at(1)), false);
    } else if (is_atomic) {
      const bool returns = family == "atom";
      i.to[0] = returns ? destination(operands.at(0)) : kernel_.registers++;
      address(i, operands.at(returns));
      sources(i, {operands.begin() + 1 + returns, operands.end()}, 1);
    } else if (i.kind == Kind::kBlockBarrier) {
      barrier(i, operands);
    } else {
      general(i, operands, name == "bar.warp.sync" ? 0 : 1);
    }
    if (operation->members >= 0) {
      i.members = i.from[operation->members];
    }
    append(i);
  }

  // Without what only says how memory is cached, and without the length of a vector.
  std::string plain_name(const std::string& name, Instruction& i) {
    std::string plain;
    const bool is_atomic = name.compare(0, 2, "ld") != 0 && name.compare(0, 2, "st") != 0;
    bool is_volatile = false;
    for (const std::string_view part : split(name, '.')) {
      if (part == "v2" || part == "v4") {
        i.width = static_cast<uint8_t>(part[1] - '0');
      } else if (part == "volatile" || (is_scope(part) && !is_atomic)) {
        is_volatile = true;
      } else if (!is_cache_hint(part) && !is_scope(part)) {
        plain += (plain.empty() ? "" : ".") + std::string(part);
      }
    }
    if (plain.compare(0, 4, "red.") == 0) {
      plain.replace(0, 3, "atom");
    }
    return is_volatile ? plain.insert(2, ".volatile") : plain;
  }

  void vector(std::array<Operand, 4>& to, const std::vector<std::string_view>& names, bool loads) {
    for (size_t k = 0; k < names.size(); ++k) {
      to.at(k) = loads ? destination(names[k]) : source(names[k]);
    }
  }

  void sources(Instruction& i, const std::vector<std::string_view>& names, size_t first) {
    for (size_t k = 0; k < names.size(); ++k) {
      i.from.at(first + k) = source(names[k]);
    }
  }

  void general(Instruction& i, const std::vector<std::string_view>& operands, size_t results) {
    if (results == 1 && !operands.empty()) {
      const auto both = split(operands[0], '|');  // a shuffle's value and whether it was in range
      for (size_t k = 0; k < both.size(); ++k) {
        i.to.at(k) = destination(both[k]);
      }
    }
    if (operands.size() > results) {
      sources(i, {operands.begin() + static_cast<long>(results), operands.end()}, 0);
    }
  }

  // Of the sixteen barriers of a block only the first is used, always by all of its threads.
  void barrier(Instruction& i, const std::vector<std::string_view>& operands) {
    const bool reduces = operands.size() == 3;
    if (operands.at(reduces) != "0" || operands.size() == 2) {
      fail("unknown instruction `" + std::string(current_) + "`: a barrier of its own");
    }
    if (reduces) {
      i.to[0] = destination(operands[0]);
      i.from[0] = source(operands[2]);
    }
  }

  void move_vector(Instruction& i, const std::vector<std::string_view>& operands, size_t bytes) {
    const bool packs = operands[1][0] == '{';
    const auto parts = members_of(operands[packs]);
    i.run = packs ? packing(bytes, parts.size()) : unpacking(bytes, parts.size());
    if (packs) {
      i.to[0] = destination(operands[0]);
      sources(i, parts, 0);
    } else {
      vector(i.to, parts, true);
      i.from[0] = source(operands[1]);
    }
    append(i);
  }

  void link() {
    for (const auto& [at, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) {
        fail("no label " + label + " in " + kernel_.name);
      }
      kernel_.code[at].target = found->second;
    }
    kernel_.dynamic_shared_at = align(kernel_.static_shared, 128);
    if (dynamic_ != kNone) {
      kernel_.constants[~dynamic_].fill(kernel_.dynamic_shared_at);
    }
    kernel_.executed.assign(kernel_.code.size(), 0);
  }

  Module& module_;
  Kernel& kernel_;
  size_t at_, end_;
  int line_, file_ = 0, source_line_ = 0;
  std::string_view current_;
  std::vector<std::unordered_map<std::string, Operand>> scopes_;
  std::unordered_map<std::string, size_t> symbols_;
  std::unordered_map<std::string, int> labels_;
  std::unordered_map<uint64_t, Operand> constant_of_;
  std::vector<std::pair<size_t, std::string>> branches_;
  Operand dynamic_ = kNone;
};

void decode(Module& module, Kernel& kernel, const Module::Entry& entry) {
  Decoder(module, kernel, entry).decode();
}

}  // namespace ptx
