// The boxes of a batch, padded to the same number in each image.
#pragma once

#include <optional>
#include <vector>

#include "../checks.h"

namespace focalops {

inline std::vector<int64_t> read_counts(const char* op, const Tensor& gt_boxes,
                                        const std::optional<Tensor>& counts_) {
  const int64_t num_images = gt_boxes.size(0), most = gt_boxes.size(1);
  std::vector<int64_t> counts(num_images, most);
  if (counts_.has_value()) {
    const int64_t stride = counts_->stride(0);
    dispatch_index(counts_->scalar_type(), [&](auto tag) {
      const auto* data = static_cast<const tag_t<decltype(tag)>*>(counts_->const_data_ptr());
      for (int64_t b = 0; b < num_images; ++b) {
        counts[b] = data[b * stride];
        if (counts[b] < 0 || counts[b] > most) {
          fail(op, ": counts must lie in [0, ", most, "], the number of padded boxes, got ",
               counts[b]);
        }
      }
    });
  }
  return counts;
}

}  // namespace focalops
