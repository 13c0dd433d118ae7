"""The build and the loading of the native libraries, as far as they can be tested without compiling."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from focalops import _library
from focalops.info import covers

ROOT = Path(__file__).parent.parent


def run_python(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def fake_nvcc(home, version):
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def find_nvcc(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]


def test_import_without_libraries_says_how_to_build_them(tmp_path):
    (tmp_path / "focalops").mkdir()
    for source in (ROOT / "focalops").glob("*.py"):
        shutil.copy(source, tmp_path / "focalops")
    # An editable install would lend the copy its libraries.
    without = "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]"
    result = run_python("-c", f"import sys; {without}; import focalops", cwd=tmp_path)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: focalops is not compiled for this Python")
    assert "pip install --no-build-isolation ." in last_line


def test_too_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer, and this is 2\.9\.1"):
        _library._load_cpu()


@pytest.mark.parametrize(
    ("built", "running", "reason"),
    [
        (None, "13.2", "built with FOCALOPS_CUDA=0"),
        ("13.0", None, "has no CUDA"),
        ("13.0", "12.8", "focalops was built for CUDA 13.0, and this torch is for CUDA 12.8"),
    ],
)
def test_cuda_library_is_left_alone_where_it_does_not_fit(monkeypatch, built, running, reason):
    monkeypatch.setitem(_library.build_info, "cuda_version", built)
    monkeypatch.setitem(_library.build_info, "no_cuda_reason", "built with FOCALOPS_CUDA=0")
    monkeypatch.setattr(torch.version, "cuda", running)
    assert reason in _library._load_cuda()


def test_info():
    result = run_python("-m", "focalops.info")
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert "CPU" in rows["sigmoid_focal_loss"]


def test_info_ends_quietly_when_its_reader_leaves():
    command = f"{sys.executable} -u -m focalops.info | true"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),
        ("8.6 9.0", (8, 0), False),
        ("8.0 9.0", (12, 0), False),
        ("8.0 9.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0 12.0+PTX", (9, 0), False),
    ],
)
def test_covers(archs, capability, runs):
    assert covers(archs, capability) is runs


# CUDA 99, so that no toolkit of the machine can be meant.


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_an_environment_variable(find_nvcc, monkeypatch, tmp_path, variable):
    nvcc = fake_nvcc(tmp_path, "99.1")
    monkeypatch.setenv(variable, str(tmp_path))
    assert find_nvcc("99.2") == (nvcc, "99.1")
    assert find_nvcc("98.2") is None


def test_nvcc_on_the_path(find_nvcc, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "99.1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert find_nvcc("99.2") == (nvcc, "99.1")


def test_nvcc_of_wheels(find_nvcc, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path / "nvidia/cu99", "99.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_nvcc("99.1") == (nvcc, "99.1")


def test_sdist_builds_and_its_tests_are_collected(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "_build", "_generated")
    for directory in ("csrc", "focalops", "models", "benchmarks", "tests", "docs"):
        shutil.copytree(ROOT / directory, source / directory, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix not in (".pt", ".pt2"):
            shutil.copy(path, source)
    needed = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    needed -= {path.name for path in source.iterdir() if path.name.startswith(".")}

    result = run_python("setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("focalops-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
        assert needed <= held, needed - held
        tar.extractall(tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for library in (ROOT / "focalops").glob("*.so"):  # as a build would put them there
        (unpacked / "focalops" / library.name).symlink_to(library)
    collected = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--co", cwd=unpacked)
    assert collected.returncode == 0, collected.stdout[-2000:]


def build_without(monkeypatch, tmp_path, *tools):
    """What `python setup.py build_ext` says where these cannot be found."""
    setuptools = pytest.importorskip("setuptools")
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name in tools else found(name))
    setup = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setitem(setup["find_ninja"].__globals__, "find_spec", lambda name: None)
    command = setup["BuildNative"](setuptools.Distribution({"name": "focalops"}))
    command.initialize_options()
    command.build_temp = command.build_lib = str(tmp_path)
    command.torch, command.pybind11, command.info = Path("torch"), "pybind11", {}
    command.extensions = [setup["CPU"], setup["MODULE"]]
    with pytest.raises(SystemExit) as error:
        command.build_extensions()
    return str(error.value)


@pytest.mark.parametrize(
    ("tool", "remedy"),
    [("ninja", "pip install ninja"), ("g++", "install a C\\+\\+17 compiler")],
)
def test_a_missing_build_tool_is_named(monkeypatch, tmp_path, tool, remedy):
    monkeypatch.delenv("CXX", raising=False)
    message = build_without(monkeypatch, tmp_path, tool)
    assert re.fullmatch(
        f"building focalops needs {re.escape(tool)}.*not found: {remedy}.*", message
    )


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_loops_over_floats_are_vectorised():
    """A clone for AVX-512 with scalar arithmetic alone is a loop that the compiler gave up on, in silence."""
    library = next((ROOT / "focalops").glob("libfocalops.*"))
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", library], capture_output=True, text=True
    ).stdout
    functions = re.findall(
        r"^[0-9a-f]+ <(\S+)\.arch_x86_64_v4>:\n((?:.+\n)+)", listing, re.MULTILINE
    )
    if not functions:
        pytest.skip("compiled without clones")
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, _ in functions), capture_output=True, text=True
    ).stdout.splitlines()
    arithmetic = r"\tv(?:add|sub|mul|div|fn?m(?:add|sub)\d+)"
    scalar = [
        name
        for name, (_, body) in zip(names, functions, strict=True)
        if "double" not in name  # whose exponential is a call
        and re.search(arithmetic + "ss ", body)
        and not re.search(arithmetic + "ps .*%[yz]mm", body)
    ]
    assert not scalar
