// A PTX file: where its kernels and variables are, and where its instructions come from.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>

#include "text.h"

namespace ptx {

void fail(const std::string& what) { throw std::runtime_error("PTX: " + what); }

namespace {

// One past the brace that closes the first one from `at` on.
size_t end_of_body(const std::string& text, size_t at) {
  int depth = 0;
  for (at = text.find('{', at); at < text.size(); ++at) {
    depth += text[at] == '{' ? 1 : text[at] == '}' ? -1 : 0;
    if (depth == 0) {
      return at + 1;
    }
  }
  fail("a kernel without an end");
}

}  // namespace

Module::Module(std::string text, std::string name)
    : text_(std::move(text)), name_(std::move(name)) {
  // Outside kernels a line begins with its directive.
  for (size_t at = 0; at < text_.size();) {
    const size_t line_end = std::min(text_.size(), text_.find('\n', at));
    const std::string_view line = trimmed({text_.data() + at, line_end - at});
    const size_t entry = line.find(".entry ");
    if (line.substr(0, 8) == ".section") {
      break;  // of debugging, to the end of the file
    }
    if (entry != std::string_view::npos && line[0] == '.') {
      const size_t begin = at + (line.data() - text_.data() - at) + entry;
      size_t name_end = begin + 7;
      while (is_name(text_[name_end])) {
        ++name_end;
      }
      const std::string kernel = canonical_name(text_.substr(begin + 7, name_end - begin - 7));
      const size_t end = end_of_body(text_, begin);
      entries_[kernel] = {begin, end};
      names_.push_back(kernel);
      at = end;
      continue;
    }
    if (line.find(".func") != std::string_view::npos) {
      fail(name_ +
           " has functions, and calls are not executed: " + std::string(line.substr(0, 80)));
    }
    const size_t space =
        std::min(line.find(".shared "), std::min(line.find(".global "), line.find(".const ")));
    if (!line.empty() && line[0] == '.' && space != std::string_view::npos) {
      const size_t end = text_.find(';', at);
      const size_t type = text_.find_first_of(" ", line.data() - text_.data() + space);
      auto [variable_name, variable] = parse_variable(trimmed({text_.data() + type, end - type}));
      variable.is_shared = line.compare(space, 8, ".shared ") == 0;
      variables_.emplace(variable_name, std::move(variable));
      at = end + 1;
      continue;
    }
    at = line_end + 1;
  }
  for (size_t at = text_.rfind("\n}"); (at = text_.find(".file", at)) != std::string::npos; ++at) {
    const size_t quote = text_.find('"', at), end = text_.find('"', quote + 1);
    files_[std::atoi(text_.c_str() + at + 5)] = text_.substr(quote + 1, end - quote - 1);
  }
}

Kernel& Module::kernel(const std::string& name) {
  auto& kernel = kernels_[name];
  if (!kernel) {
    auto made = std::make_unique<Kernel>();
    made->name = name;
    decode(*this, *made, entries_.at(name));
    kernel = std::move(made);
  }
  return *kernel;
}

const Kernel* Module::decoded(const std::string& name) const {
  const auto found = kernels_.find(name);
  return found == kernels_.end() ? nullptr : found->second.get();
}

bool Module::has_variable_at(uint64_t address, size_t size) const {
  return std::any_of(memory_.begin(), memory_.end(), [&](const auto& entry) {
    const uint64_t at = address - reinterpret_cast<uint64_t>(entry.second.get());
    return at + size <= variables_.find(entry.first)->second.size && at < at + size;
  });
}

std::string_view Module::text(const Instruction& i) const {
  const std::string_view rest = std::string_view(text_).substr(static_cast<size_t>(i.text));
  return trimmed(rest.substr(0, rest.find(';')));
}

std::string Module::source(const Instruction& i) const {
  const auto file = files_.find(i.file);
  if (file == files_.end()) {
    return name_ + ":" + std::to_string(i.line);
  }
  const size_t ours = file->second.rfind("csrc/");
  return file->second.substr(ours == std::string::npos ? 0 : ours) + ":" +
         std::to_string(i.source_line);
}

std::string canonical_name(const std::string& mangled) {
  // Each compiler has its own name for an anonymous namespace.
  static const std::string kAnonymous = "_GLOBAL__N_";
  std::string one_name;
  size_t done = 0;
  for (size_t at; (at = mangled.find(kAnonymous, done)) != std::string::npos;) {
    size_t digits = at;
    while (digits > done && is_digit(mangled[digits - 1])) {
      --digits;
    }
    const size_t length = digits < at ? number({mangled.data() + digits, at - digits}) : 0;
    one_name += mangled.substr(done, digits - done) + "12_GLOBAL__N_1";
    done = at + length;
  }
  one_name += mangled.substr(done);

  int status = 0;
  char* const demangled = abi::__cxa_demangle(one_name.c_str(), nullptr, nullptr, &status);
  if (demangled == nullptr) {
    return one_name;
  }
  std::string name = demangled;
  std::free(demangled);
  if (name.compare(0, 5, "void ") == 0) {
    name.erase(0, 5);
  }
  // Parameters are mangled differently where their types depend on the template's.
  static const std::string kNamespace = "(anonymous namespace)";
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name.compare(i, kNamespace.size(), kNamespace) == 0) {
      i += kNamespace.size() - 1;
    } else if (name[i] == '(' && depth == 0) {
      return name.substr(0, i);
    } else {
      depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    }
  }
  return name;
}

}  // namespace ptx
