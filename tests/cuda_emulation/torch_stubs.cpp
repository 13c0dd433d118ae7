// The parts of libtorch that a CPU-only torch lacks, or that would look for a GPU: there is one
// stream a thread, and no device. And those that give pointers to a kernel: what an executor's
// kernels may access is the memory of these tensors, and no more.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "emulation.h"

namespace emulation {

namespace {

// From the first element to the last, which for a view is less than its storage.
void remember_allocation(AtenTensorHandle tensor, const void* begin) {
  int64_t dim = 0, bytes = 1, count = 1;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  for (int64_t i = 0; i < dim; ++i) {
    count *= sizes[i];
    bytes += (sizes[i] - 1) * strides[i];
  }
  if (count > 0) {
    allow_access(begin, static_cast<size_t>(bytes) * aoti_torch_dtype_element_size(dtype));
  }
}

template <typename Pointer>
AOTITorchError data_ptr(const char* name, AtenTensorHandle tensor, Pointer* pointer) {
  const auto next =
      reinterpret_cast<AOTITorchError (*)(AtenTensorHandle, Pointer*)>(dlsym(RTLD_NEXT, name));
  const AOTITorchError error = next(tensor, pointer);
  if (executor != nullptr && error == AOTI_TORCH_SUCCESS) {
    remember_allocation(tensor, *pointer);
  }
  return error;
}

}  // namespace

}  // namespace emulation

extern "C" {

AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** pointer) {
  return emulation::data_ptr("torch_get_mutable_data_ptr", tensor, pointer);
}

AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** pointer) {
  return emulation::data_ptr("torch_get_const_data_ptr", tensor, pointer);
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line,
                                        bool, char** message) {
  const std::string text =
      "CUDA error " + std::to_string(error) + " at " + file + ":" + std::to_string(line);
  *message = error == 0 ? nullptr : strdup(text.c_str());
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

}  // extern "C"
