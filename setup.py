"""Compiles csrc/ into three libraries inside the package, with ninja.

libfocalops.so       op schemas and CPU kernels; needs libtorch_cpu only
libfocalops_cuda.so  CUDA kernels; left out where torch has no CUDA or no nvcc fits it
_C                   what is not an op (pybind11, the only one tied to this Python)

FOCALOPS_CUDA=0 leaves the CUDA kernels out, FOCALOPS_CUDA=1 makes it an error if they cannot be
built. TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CXXFLAGS, NVCC_CCBIN and NVCC_APPEND_FLAGS are honoured.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

OLDEST_SETUPTOOLS = (70, 1)  # that make wheels without the package wheel
if tuple(int(part) for part in setuptools.__version__.split(".")[:2]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"building focalops needs setuptools 70.1 or newer, got {setuptools.__version__}: "
        "pip install --upgrade 'setuptools>=70.1'"
    )

OLDEST_TORCH = (2, 10)  # that the op libraries load on
ABI_TARGET = ".".join(map(str, OLDEST_TORCH))
DEFAULT_ARCHS = ["8.0", "9.0", "10.0", "12.0"]

COMMON_FLAGS = ["-std=c++17", "-O3"]
COMMON_FLAGS.append("-DTORCH_TARGET_VERSION=0x{:02x}{:02x}{:012x}".format(*OLDEST_TORCH, 0))
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = [
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-warn-spills",
]

# Without contraction an IoU has the same bits on every SIMD width and on the GPU; losses and softmaxes
# need no such promise. Logarithms and exponentials vectorise only where errno and the floating-point
# flags may be ignored.
CPU_FLAGS = ["-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LOSS_FLAGS = ["-ffp-contract=fast"]
CPU_FLAGS_OF = {
    "csrc/cpu/focal_loss.cpp": LOSS_FLAGS,
    "csrc/cpu/decode_distances.cpp": LOSS_FLAGS,
    "csrc/cpu/dense_equalized_focal_loss.cpp": LOSS_FLAGS,
    "csrc/cpu/dense_focal_loss.cpp": LOSS_FLAGS,
    "csrc/cpu/dense_row_losses.cpp": LOSS_FLAGS,
    "csrc/cpu/distribution_focal_loss.cpp": LOSS_FLAGS,
    "csrc/cpu/row_losses.cpp": LOSS_FLAGS,
}

CPU = Extension("focalops.libfocalops", ["csrc/library.cpp", *sorted(glob("csrc/cpu/*.cpp"))])
CUDA = Extension("focalops.libfocalops_cuda", sorted(glob("csrc/cuda/*.cu")))
MODULE = Extension("focalops._C", ["csrc/module.cpp"])


class CannotBuildCuda(Exception):
    pass


def find_nvcc(cuda: str) -> tuple[str, str] | None:
    """The path and version of an nvcc of the same major version as `cuda`, system toolkits first."""
    major = cuda.split(".")[0]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [
        *(Path(home, "bin/nvcc") for home in homes if home),
        shutil.which("nvcc"),
        *sorted(Path("/usr/local").glob("cuda*/bin/nvcc")),
        *(Path(path, f"nvidia/cu{major}/bin/nvcc") for path in sys.path),  # from wheels
    ]
    for nvcc in filter(None, candidates):
        try:
            banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError:
            continue
        release = re.search(r"release (\d+)\.(\d+)", banner)
        if release and release[1] == major:
            return str(nvcc), f"{release[1]}.{release[2]}"
    return None


def nvcc_for_torch() -> tuple[str, str]:
    """The path and version of the nvcc to build with."""
    import torch

    if os.environ.get("FOCALOPS_CUDA") == "0":
        raise CannotBuildCuda("FOCALOPS_CUDA=0 was set")
    cuda = torch.version.cuda
    if cuda is None:
        raise CannotBuildCuda(f"torch {torch.__version__} has no CUDA")
    if nvcc := find_nvcc(cuda):
        return nvcc
    major = int(cuda.split(".")[0])
    wheels = f"`pip install 'cuda-toolkit[nvcc,cccl]=={cuda}.*'`"
    remedy = wheels if major >= 13 else f"install a CUDA {major} toolkit, set CUDA_HOME to it"
    raise CannotBuildCuda(
        f"torch {torch.__version__} needs an nvcc of CUDA {major} and none was found: {remedy} and"
        " build again"
    )


def archs_for(nvcc: str) -> list[str]:
    """The compute capabilities to compile for, such as 9.0, 10.0a or 12.0+PTX."""
    import torch

    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = re.split(r"[;, ]+", requested.strip("; "))
        for arch in archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {arch!r}")
        return archs
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = sorted({f"{major}.{minor}" for major, minor in gpus}) or DEFAULT_ARCHS
    archs = [arch for arch in wanted if f"sm_{arch.replace('.', '')}" in listing.split()]
    if not archs:
        raise CannotBuildCuda(f"{nvcc} cannot compile for compute capability {', '.join(wanted)}")
    return archs if gpus else [*archs[:-1], f"{archs[-1]}+PTX"]


def find_ninja() -> list[str]:
    if find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return [find_tool("ninja", "pip install ninja")]


def find_tool(name: str, remedy: str) -> str:
    if shutil.which(name) is None:
        raise SystemExit(f"building focalops needs {name}, and it was not found: {remedy}")
    return name


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # pip names temporary folders, in which everything would be compiled once more.
            default = build(self.distribution)
            default.ensure_finalized()
            self.build_temp, self.build_lib = default.build_temp, default.build_lib

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_C"):
            return super().get_ext_filename(fullname)
        return f"{fullname.replace('.', '/')}.so"

    def run(self) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            needed = "pip install torch pybind11 ninja"
            raise SystemExit(f"building focalops needs {error.name}: {needed}") from None
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
            needed = f"focalops needs torch {ABI_TARGET} or newer, got {torch.__version__}"
            raise SystemExit(f"{needed}: run `pip install --upgrade 'torch>={ABI_TARGET}'`")

        self.pybind11 = pybind11.get_include()
        self.torch = Path(torch.__file__).parent
        self.info = {"ABI_TARGET": ABI_TARGET, "TORCH_VERSION": torch.__version__}
        try:
            self.nvcc, version = nvcc_for_torch()
            self.archs = archs_for(self.nvcc)
            self.info |= {"CUDA_VERSION": version, "CUDA_ARCHS": " ".join(self.archs)}
            print(f"CUDA kernels for {' '.join(self.archs)}, by {self.nvcc} (CUDA {version})")
        except CannotBuildCuda as reason:
            if os.environ.get("FOCALOPS_CUDA") == "1":
                needed = "a torch with CUDA and an nvcc that fits it"
                raise SystemExit(f"FOCALOPS_CUDA=1 needs {needed}, but {reason}") from None
            print(f"CUDA kernels left out: {reason}")
            self.info["NO_CUDA_REASON"] = str(reason)
            self.extensions = [CPU, MODULE]
            # What an earlier build left there would go into the wheel.
            Path(self.get_ext_fullpath(CUDA.name)).unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        self.ninja = [f"builddir = {self.build_temp}", "rule run", " command = $cmd"]
        self.ninja.append(" description = $out")
        self.add_libraries()
        path = Path(self.build_temp, "build.ninja")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.ninja) + "\n")

        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        if subprocess.run([*find_ninja(), "-f", path, "-j", jobs]).returncode:
            raise CompileError("ninja failed; what it printed above says why")

    def add_libraries(self) -> None:
        cxx = shlex.split(os.environ.get("CXX") or "g++")
        find_tool(cxx[0], "install a C++17 compiler, such as g++, or set CXX to one")
        cxx_flags = [*COMMON_FLAGS, *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        headers = ["-isystem", str(self.torch / "include")]
        libtorch = [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]

        def cpu_flags(source: str) -> list[str]:
            return [*cxx_flags, *CPU_FLAGS, *CPU_FLAGS_OF.get(source, []), *headers]

        self.link(CPU, [*cxx, *self.compile(CPU, cxx, cpu_flags), *libtorch, "-Wl,-z,defs"])

        info = [f'-DFOCALOPS_{name}="{value}"' for name, value in self.info.items()]
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", self.pybind11]
        self.link(MODULE, [*cxx, *self.compile(MODULE, cxx, lambda _: cxx_flags + info + python)])

        if CUDA in self.extensions:
            gencodes = [flag for arch in self.archs for flag in gencode(arch)]
            flags = [*COMMON_FLAGS, *NVCC_FLAGS, *gencodes, *headers]
            objects = self.compile(CUDA, [self.nvcc], lambda _: flags)
            # nvcc links the static CUDA runtime; its symbols are hidden, so that calls cannot end
            # up in the shared runtime that torch has loaded.
            hidden = ["-Xlinker=--exclude-libs,ALL", "-Xlinker=-z,defs"]
            self.link(CUDA, [self.nvcc, *objects, *libtorch, "-ltorch_cuda", *hidden])

    def compile(
        self, extension: Extension, compiler: list[str], flags_of: Callable[[str], list[str]]
    ) -> list[str]:
        objects = [f"{self.build_temp}/{source}.o" for source in extension.sources]
        for source, output in zip(extension.sources, objects, strict=True):
            flags = [*flags_of(source), "-MMD", "-MF", f"{output}.d"]
            self.add_edge(output, [source], [*compiler, *flags, "-c", source, "-o", output])
            self.ninja += [" deps = gcc", f" depfile = {output}.d"]
        return objects

    def link(self, extension: Extension, command: list[str]) -> None:
        output = self.get_ext_fullpath(extension.name)
        objects = [argument for argument in command if argument.endswith(".o")]
        self.add_edge(output, objects, [*command, "-shared", "-o", output])

    def add_edge(self, output: str, inputs: list[str], command: list[str]) -> None:
        output, *inputs = (re.sub(r"([$ :])", r"$\1", path) for path in (output, *inputs))
        self.ninja.append(f"build {output}: run {' '.join(inputs)}")
        self.ninja.append(f" cmd = {shlex.join(command).replace('$', '$$')}")


if __name__ == "__main__":
    setup(
        # pyproject.toml has no form of it that suits both old and new setuptools.
        license="BSD-3-Clause",
        # models/ is installed as focalops.models.
        packages=[
            "focalops",
            *(f"focalops.{name}" for name in find_packages(include=["models", "models.*"])),
        ],
        package_dir={"focalops.models": "models"},
        ext_modules=[CPU, CUDA, MODULE],
        cmdclass={"build_ext": BuildNative},
    )
