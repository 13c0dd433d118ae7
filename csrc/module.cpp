// The Python module `_C` has what is not an op. It links to neither torch nor CUDA, so that it
// loads, and can say what was built, wherever the package is imported.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

#ifdef __clang__
constexpr char kCompiler[] = "clang " __clang_version__;
#else
constexpr char kCompiler[] = "g++ " __VERSION__;
#endif

// Tells how the native libraries were built; None for what does not apply.
py::dict build_info() {
  py::dict info;
  info["torch_version"] = FOCALOPS_TORCH_VERSION;
  info["abi_target"] = FOCALOPS_ABI_TARGET;
  info["compiler"] = kCompiler;
#ifdef FOCALOPS_CUDA_VERSION
  info["cuda_version"] = FOCALOPS_CUDA_VERSION;
  info["cuda_archs"] = FOCALOPS_CUDA_ARCHS;
  info["no_cuda_reason"] = py::none();
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
  info["no_cuda_reason"] = FOCALOPS_NO_CUDA_REASON;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) { m.def("build_info", &build_info, "How the native libraries were built."); }
