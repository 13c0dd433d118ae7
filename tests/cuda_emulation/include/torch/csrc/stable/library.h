// The ops of csrc/ register under a namespace of their own, focalops_emulated, and their CUDA
// kernels as its CPU kernels: they take CPU tensors, beside the real ops. Any other dispatch key
// does not compile.
#pragma once

#include_next <torch/csrc/stable/library.h>

#define EMULATED_DEFINITIONS_OF_focalops(m) EMULATED_DEFINITIONS(focalops_emulated, m)
#define EMULATED_KERNELS_OF_focalops_CUDA(m) EMULATED_KERNELS(focalops_emulated, CPU, m)

// The library's own macros, whose arguments may be macros again.
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) EMULATED_DEFINITIONS_OF_##ns(m)
#define EMULATED_DEFINITIONS(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(ns, m, C10_UID)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) EMULATED_KERNELS_OF_##ns##_##key(m)
#define EMULATED_KERNELS(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, key, m, C10_UID)
