// The small change of reading PTX.
#pragma once

#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "program.h"

namespace ptx {

inline bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

inline std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_space(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && is_space(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

// The pieces between separators that are outside brackets and braces.
inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> pieces;
  size_t begin = 0;
  int depth = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : separator;
    depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
    if (i == text.size() || (c == separator && depth == 0)) {
      pieces.push_back(trimmed(text.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  if (pieces.size() == 1 && pieces[0].empty()) {
    pieces.clear();
  }
  return pieces;
}

// The members of a vector {a, b}, or the one operand that is there.
inline std::vector<std::string_view> members_of(std::string_view operand) {
  if (!operand.empty() && operand.front() == '{') {
    return split(operand.substr(1, operand.size() - 2), ',');
  }
  return {operand};
}

inline size_t align(size_t at, size_t to) { return (at + to - 1) / to * to; }

inline uint64_t number(std::string_view text) {
  const std::string digits(text);
  if (text.substr(0, 2) == "0f" || text.substr(0, 2) == "0F" || text.substr(0, 2) == "0d" ||
      text.substr(0, 2) == "0D") {
    return std::stoull(digits.substr(2), nullptr, 16);
  }
  return digits[0] == '-' ? static_cast<uint64_t>(std::stoll(digits, nullptr, 0))
                          : std::stoull(digits, nullptr, 0);
}

// The size in bytes that a type such as b32 has.
inline size_t size_of(std::string_view type) {
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string_view::npos ? 1 : std::stoul(std::string(type.substr(digits))) / 8;
}

// ".align 8 .b8 name[64]", ".u64 name" or ".align 4 .b8 name[4] = {1, 2, 3, 4}"; in
// ".u64 .ptr .align 1 name" the alignment is of what the pointer leads to.
inline std::pair<std::string, Module::Variable> parse_variable(std::string_view text) {
  Module::Variable variable;
  const size_t equals = text.find('=');
  std::string_view declared = trimmed(text.substr(0, equals));
  size_t element = 1, count = 1;
  bool is_pointer = false;
  variable.alignment = 0;
  while (!declared.empty() && declared.front() == '.') {
    const size_t end = declared.find_first_of(" \t\n");
    const std::string_view word = declared.substr(1, end - 1);
    declared = trimmed(declared.substr(end));
    if (word == "align") {
      const size_t digits = declared.find_first_of(" \t\n");
      variable.alignment = is_pointer ? 0 : number(declared.substr(0, digits));
      declared = trimmed(declared.substr(digits));
    } else if (word == "ptr") {
      is_pointer = true;
    } else if (word.size() >= 2 && is_digit(word[1])) {
      element = size_of(word);
    }
  }
  const size_t bracket = declared.find('[');
  if (bracket != std::string_view::npos) {
    const std::string_view inside = declared.substr(bracket + 1, declared.find(']') - bracket - 1);
    count = inside.empty() ? 0 : number(inside);
  }
  variable.size = element * count;
  variable.alignment = variable.alignment == 0 ? element : variable.alignment;
  if (equals != std::string_view::npos) {
    for (const std::string_view item : members_of(trimmed(text.substr(equals + 1)))) {
      const uint64_t bits = number(item);
      const auto* bytes = reinterpret_cast<const unsigned char*>(&bits);
      variable.initial.insert(variable.initial.end(), bytes, bytes + element);
    }
  }
  return {std::string(trimmed(declared.substr(0, bracket))), variable};
}

}  // namespace ptx
