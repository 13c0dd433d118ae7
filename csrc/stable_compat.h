// What LibTorch's stable ABI lacks at TORCH_TARGET_VERSION (2.10). Each shim says when it can go.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <tuple>

// Goes when torch >= 2.11 is required, which renamed it.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace focalops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A str of a schema. Goes when torch >= 2.14 is required: std::string, of which the conversion in
// the headers of 2.10 leaks one a call.
struct Name : std::string {};

// Goes when torch >= 2.15 is required: torch::stable::sort.
inline std::tuple<Tensor, Tensor> stable_sort_descending(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

#ifdef USE_CUDA
// Goes when torch >= 2.13 is required: torch::stable::accelerator::Stream::nativeHandle.
inline void* current_cuda_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}
#endif

}  // namespace focalops

template <>
struct torch::stable::detail::ToImpl<focalops::Name> {
  static focalops::Name call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    focalops::Name name{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
