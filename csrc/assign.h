// The options of the assigners.
#pragma once

#include <cstdint>
#include <vector>

#include "head_levels.h"
#include "math/assign.h"

namespace focalops {

enum class FcosRule { kTorchvision, kMmdet };

struct FcosOptions {
  const std::vector<int64_t>& level_sizes;  // points of each level
  const std::vector<double>& strides;
  const std::vector<double>& least;  // the range of each level
  const std::vector<double>& most;
  double center_radius;
  int64_t rule;  // of FcosRule
};

// Calls f with the rule's formulas.
template <typename F>
void dispatch_fcos(const FcosOptions& options, const F& f) {
  if (options.rule == static_cast<int64_t>(FcosRule::kTorchvision)) {
    return f(TorchvisionFcos{});
  }
  return f(MmdetFcos{});
}

template <typename T>
std::vector<FcosLevel<T>> fcos_levels(const FcosOptions& options) {
  std::vector<FcosLevel<T>> levels;
  for (size_t i = 0; i < options.level_sizes.size(); ++i) {
    levels.push_back({T(options.center_radius) * T(options.strides[i]), T(options.least[i]),
                      T(options.most[i])});
  }
  return levels;
}

// ---- ATSS

enum class AtssRule { kAtss, kMmyolo };

constexpr int64_t kMaxAtssTopk = 128;

struct AtssOptions {
  const std::vector<int64_t>& level_sizes;  // anchors of each level
  int64_t topk;
  int64_t rule;  // of AtssRule
  bool at_least_one;
};

// Calls f with the rule's formulas.
template <typename F>
void dispatch_atss(const AtssOptions& options, const F& f) {
  if (options.rule == static_cast<int64_t>(AtssRule::kAtss)) {
    return f(MmdetAtss{});
  }
  return f(MmyoloAtss{});
}

}  // namespace focalops
