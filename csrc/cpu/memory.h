// Large outputs on huge pages. A fresh 64 MB tensor costs 16,384 page faults, several times the
// work of filling it; with pages of 2 MB there are 32. Advice only: where the system has none to
// give, nothing changes.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "../stable_compat.h"

namespace focalops {

inline Tensor on_huge_pages(Tensor tensor, int64_t element_size) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + tensor.numel() * element_size) / kPage * kPage;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

}  // namespace focalops
