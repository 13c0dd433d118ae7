// What match_anchors is asked for.
#pragma once

#include <cstdint>

namespace focalops {

// What a ground-truth box is to the matching.
enum Role : uint8_t { kObject, kCrowd, kNothing };

// Which anchors a box gets whose IoU with none reaches the threshold.
enum class LowQuality { kNone, kOwnBest, kLastBox, kLastBoxFirstAnchor, kFirstBoxFirstAnchor };

// Whether of equally good anchors a box takes the first alone.
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
