// The options of match_anchors.
#pragma once

#include <cstdint>

namespace focalops {

// A ground-truth box plays one of these roles in the matching.
enum Role : uint8_t { kObject, kCrowd, kNothing };

// A box whose IoU with no anchor reaches the threshold gets anchors by one of these rules.
enum class LowQuality { kNone, kOwnBest, kLastBox, kLastBoxFirstAnchor, kFirstBoxFirstAnchor };

// By these a box takes the first of its equally good anchors alone.
inline bool takes_first_anchor(LowQuality rule) {
  return rule == LowQuality::kLastBoxFirstAnchor || rule == LowQuality::kFirstBoxFirstAnchor;
}

struct MatchRule {
  double fg_iou_threshold, bg_iou_threshold;
  int64_t low_quality;  // of LowQuality
  double min_pos_iou;
  double crowd_threshold;
};

}  // namespace focalops
