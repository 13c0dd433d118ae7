"""Builds the wheel, looks into it, and tries it in a fresh environment: `make wheel`.

torch's libraries stay outside of the wheel: they are those of the torch that it is installed beside. `auditwheel` names the oldest glibc
that the rest needs, and copies nothing into it.

    python tests/try_wheel.py DIST            builds one, into DIST
    python tests/try_wheel.py --same WHEEL... whether the libraries of the operators are the same in all
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("tests/", "benchmarks/", "docs/", "csrc/", "build/")
NEEDED = (
    "focalops/__init__.py",
    "focalops/_C.pyi",
    "focalops/libfocalops.so",
    "focalops/models/__main__.py",
    "focalops/models/cpp/Makefile",
    "focalops/models/cpp/detect.cpp",
    "focalops/py.typed",
    "focalops/reference.py",
)
OUTSIDE = ("libtorch*", "libc10*")
MOST_MB = {False: 10, True: 200}  # without CUDA kernels, and with those of all architectures
TRY = """
import torch, focalops
assert "site-packages" in focalops.__file__, focalops.__file__
boxes, scores = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9], [20, 20, 30, 30]]), torch.tensor([0.5, 0.9, 0.1])
assert focalops.nms(boxes, scores, 0.5).tolist() == [1, 2]
print("focalops", focalops.__version__, "on torch", torch.__version__, "found", focalops.nms(boxes, scores, 0.5).tolist())
"""


def main(arguments: list[str]) -> None:
    if arguments[0] == "--same":
        compare([Path(wheel) for wheel in arguments[1:]])
        return
    wheel = build(Path(arguments[0]))
    look_into(wheel)
    try_out(wheel)
    print(wheel)


def build(folder: Path) -> Path:
    for stale in (ROOT / "build").glob("lib*"):  # of files that are no more
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
        run([*pip, "--quiet", "--wheel-dir", scratch, str(ROOT)])
        (plain,) = Path(scratch).glob("*.whl")
        outside = [word for name in OUTSIDE for word in ("--exclude", name)]
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{'-'.join(plain.name.split('-')[:4])}-*.whl"):
            old.unlink()
        repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(folder)]
        run([*repair, *outside, str(plain)])
        (wheel,) = folder.glob(f"{'-'.join(plain.name.split('-')[:4])}-*.whl")
        return wheel


def look_into(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    wrong = [name for name in names if name.startswith(LEFT_OUT) or ".libs/" in name]
    check(not wrong, f"has no place in a wheel: {', '.join(wrong)}")
    missing = [name for name in NEEDED if name not in names]
    check(not missing, f"is missing: {', '.join(missing)}")
    check(any(re.search(r"dist-info/.*LICENSE$", name) for name in names), "has no licence")
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    check(tops == {"focalops"}, f"installs {', '.join(sorted(tops))}, not focalops alone")
    cuda = "focalops/libfocalops_cuda.so" in names
    size = wheel.stat().st_size / 1e6
    check(size < MOST_MB[cuda], f"has {size:.1f} MB, more than {MOST_MB[cuda]}")
    kernels = "CPU and CUDA" if cuda else "CPU"
    print(f"{len(names)} files, {size:.1f} MB, {kernels} kernels; torch's libraries stay outside")


def try_out(wheel: Path) -> None:
    """In an environment that has nothing but the wheel and, by a path file, this one's torch."""
    with tempfile.TemporaryDirectory() as scratch:
        run([sys.executable, "-m", "venv", scratch])
        python = Path(scratch, "bin", "python")
        run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)])
        code = "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])"
        packages = run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        (site,) = Path(scratch).glob("lib/python*/site-packages")
        # Behind the environment's own packages, so that the wheel is what is imported.
        (site / "torch_from_outside.pth").write_text(packages + "\n")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run([python, "-c", TRY], cwd=scratch, env=clean)
        run([python, "-m", "focalops.info"], cwd=scratch, env=clean, stdout=subprocess.DEVNULL)


def compare(wheels: list[Path]) -> None:
    known: dict[str, str] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if re.fullmatch(r"focalops/libfocalops\w*\.so", name):
                    digest = hashlib.sha256(archive.read(name)).hexdigest()
                    check(known.setdefault(name, digest) == digest, f"{wheel.name}: {name} differs")
    print(f"{', '.join(known)}: the same in {len(wheels)} wheels")


def check(condition: bool, sentence: str) -> None:
    if not condition:
        raise SystemExit(f"the wheel {sentence}")


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command[:6]))} ...")
    return done


if __name__ == "__main__":
    main(sys.argv[1:])
