"""Compiles csrc/ into three libraries inside the package, with one ninja build:

libfocalops.so       op schemas and CPU kernels; needs libtorch_cpu only
libfocalops_cuda.so  CUDA kernels; skipped where torch has no CUDA or no nvcc fits it
_C                   what is not an op (pybind11, the only one tied to this Python)

FOCALOPS_CUDA=0 skips the CUDA kernels, FOCALOPS_CUDA=1 makes it an error if they cannot be built.
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS, NVCC_CCBIN and NVCC_APPEND_FLAGS are honoured.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "_build_backend"))
from focalops_backend import find_nvcc, nvcc_wheels  # noqa: E402

ABI_TARGET = "2.10"  # the oldest torch that the op libraries load on
DEFAULT_ARCHS = ["8.0", "9.0", "10.0", "12.0+PTX"]

COMMON = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION=0x{2:02x}{10:02x}{0:012x}"]
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xptxas=-warn-spills"]

# Without contraction an IoU has the same bits on every SIMD width and on the GPU. The losses need no
# such promise, and are twice as fast where the compiler may fuse and ignore the floating-point flags.
CPU_FLAGS = ["-ffp-contract=off"]
CPU_FLAGS_OF = {
    "csrc/cpu/focal_loss.cpp": ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
}

CPU = Extension("focalops.libfocalops", ["csrc/library.cpp", *sorted(glob("csrc/cpu/*.cpp"))])
CUDA = Extension("focalops.libfocalops_cuda", sorted(glob("csrc/cuda/*.cu")))
MODULE = Extension("focalops._C", ["csrc/module.cpp"])


class CannotBuildCuda(Exception):
    pass


def nvcc_for(cuda: str | None) -> tuple[str, str]:
    if os.environ.get("FOCALOPS_CUDA") == "0":
        raise CannotBuildCuda("it was built with FOCALOPS_CUDA=0")
    if cuda is None:
        raise CannotBuildCuda("it was built with a torch that has no CUDA")
    if (nvcc := find_nvcc(cuda)) is None:
        wheels = " ".join(f"pip install '{wheel}'" for wheel in nvcc_wheels(cuda))
        raise CannotBuildCuda(
            f"no nvcc {cuda.split('.')[0]}.x was found when it was built with a torch for CUDA {cuda}: "
            + (wheels or "install that CUDA toolkit and set CUDA_HOME")
        )
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to compile for, such as 9.0, 10.0a or 12.0+PTX."""
    import torch

    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = re.split(r"[;, ]+", requested.strip("; "))
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST must hold entries such as 9.0, got {arch!r}")
        return archs
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    archs = sorted({f"{major}.{minor}" for major, minor in gpus}) or DEFAULT_ARCHS
    supported = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    usable = [arch for arch in archs if "sm_" + re.sub(r"\D", "", arch) in supported]
    if not usable:
        raise CannotBuildCuda(f"{nvcc} cannot compile for compute capability {', '.join(archs)}")
    return usable


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def string_macro(name: str, value: str) -> str:
    return f'-D{name}="{value}"'


class BuildNative(build_ext):
    def get_ext_filename(self, fullname):
        if "lib" in fullname.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self):
        import torch

        self.torch = Path(torch.__file__).parent
        self.build_info = {"ABI_TARGET": ABI_TARGET, "TORCH_VERSION": torch.__version__}
        try:
            self.nvcc, toolkit = nvcc_for(torch.version.cuda)
            self.archs = cuda_archs(self.nvcc)
            self.build_info |= {"CUDA_VERSION": toolkit, "CUDA_ARCHS": " ".join(self.archs)}
            print(f"focalops: CUDA kernels for {', '.join(self.archs)} with nvcc {toolkit} ({self.nvcc})")
        except CannotBuildCuda as reason:
            if os.environ.get("FOCALOPS_CUDA") == "1":
                raise SystemExit(f"focalops has no CUDA kernels although FOCALOPS_CUDA=1: {reason}") from None
            print(f"focalops: no CUDA kernels: {reason}")
            self.build_info["NO_CUDA_REASON"] = str(reason)
            self.extensions = [extension for extension in self.extensions if extension is not CUDA]
            stale = self.get_ext_filename(CUDA.name)
            for directory in (self.build_lib, "."):
                Path(directory, stale).unlink(missing_ok=True)
        super().run()

    def build_extensions(self):
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(self.ninja_file())
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        subprocess.run([*ninja, "-f", str(temp / "build.ninja"), "-j", jobs], check=True)

    def ninja_file(self) -> str:
        import pybind11

        headers = ["-isystem", str(self.torch / "include")]
        info = [string_macro(f"FOCALOPS_{name}", value) for name, value in self.build_info.items()]
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        cxx_flags = [*COMMON, *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        libtorch = [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]
        defined = "-Wl,-z,defs"

        lines = [f"builddir = {self.build_temp}", "rule run", "  command = $cmd", "  description = $out"]

        def build(output: str, inputs: list[str], command: list[str], depfile: str = "") -> str:
            paths = [path.replace(" ", "$ ") for path in (output, *inputs)]
            lines.append(f"build {paths[0]}: run {' '.join(paths[1:])}")
            lines.append(f"  cmd = {shlex.join(command).replace('$', '$$')}")
            if depfile:
                lines.extend([f"  depfile = {depfile}", "  deps = gcc"])
            return output

        def objects(extension: Extension, compiler: list[str], flags_of) -> list[str]:
            outputs = []
            for source in extension.sources:
                output = f"{self.build_temp}/{source}.o"
                command = [*compiler, "-MMD", "-MF", f"{output}.d", *flags_of(source)]
                command += ["-c", source, "-o", output]
                outputs.append(build(output, [source], command, f"{output}.d"))
            return outputs

        def library(extension: Extension, inputs: list[str], linker: list[str], flags: list[str]) -> None:
            output = self.get_ext_fullpath(extension.name)
            build(output, inputs, [*linker, "-shared", "-o", output, *inputs, *flags])

        def cpu_flags(source):
            return [*cxx_flags, *CPU_FLAGS_OF.get(source, CPU_FLAGS), *headers]

        library(CPU, objects(CPU, cxx, cpu_flags), cxx, [*libtorch, defined])

        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        module = objects(MODULE, cxx, lambda _: [*cxx_flags, *info, *python])
        library(MODULE, module, cxx, [])

        if CUDA in self.extensions:
            nvcc_flags = [*COMMON, *NVCC_FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
            nvcc_flags += [flag for arch in self.archs for flag in gencode(arch)]
            cuda = objects(CUDA, [self.nvcc], lambda _: [*nvcc_flags, *info, *headers])
            # The static CUDA runtime stays private, so that it cannot mix with the one torch has loaded.
            private = ["-Xlinker=--exclude-libs,ALL", "-Xlinker=-z,defs"]
            library(CUDA, cuda, [self.nvcc], [*libtorch, "-ltorch_cuda", *private])
        return "\n".join(lines) + "\n"


setup(ext_modules=[CPU, CUDA, MODULE], cmdclass={"build_ext": BuildNative})
