"""Whether the libraries that are built here run under other releases of torch: `make matrix`.

An environment for each release, in build/matrix/, has that torch, and torchvision where one fits it. The tests of the operators then run in
it on the CPU, every sixteenth case of each, with the libraries of this checkout: nothing is compiled again. All of it has to be done in
LIMIT seconds, installing apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "matrix"
LIMIT = 20 * 60
NEWEST = "newest"
# Of the operators, and fast. What asks for torch.compile is of the compiler, and takes minutes.
TESTS = [
    "focal_loss",
    "softmax_focal_loss",
    "dense_focal_loss",
    "row_losses",
    "dense_row_losses",
    "boxes",
    "box_losses",
    "matching",
    "distances",
    "nms",
    "soft_nms",
    "matrix_nms",
    "detect",
    "fuse_features",
    "assign_fcos",
    "assign_atss",
    "assign_task_aligned",
    "assign_simota",
]
ONLY = "not cuda and not compile and not export and not inductor"
SAYS = (
    "import torch, focalops; from focalops._library import build_info as b; "
    "print('torch', torch.__version__, 'with libraries built on torch', b['torch_version'])"
)


def main(releases: list[str]) -> int:
    environments = {release: environment(release) for release in releases}
    until = time.monotonic() + LIMIT
    failed = []
    for release, python in environments.items():
        if run_tests(python, until - time.monotonic()):
            failed.append(release)
    if failed:
        print(f"failed under torch {', '.join(failed)}")
        return 1
    print(f"one build runs under torch {', '.join(environments)}")
    return 0


def environment(release: str) -> Path:
    folder = FOLDER / release
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        torch = "torch>=2.10" if release == NEWEST else f"torch=={release}.*"
        subprocess.run(
            [*pip, torch, "numpy", "pytest", "pytest-xdist", "hypothesis", "setuptools>=70.1"],
            check=True,
        )
        # torchvision says which torch it is of.
        installed = output([python, "-c", "import torch; print(torch.__version__)"])
        subprocess.run([*pip, f"torch=={installed}", "torchvision", "pillow"], check=False)
        if not has_torchvision(python):  # one that is there and does not load is in the way
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision"])
        done.touch()
    return python


def run_tests(python: Path, seconds: float) -> bool:
    """Whether they failed, or did not end in time."""
    print(output([python, "-c", SAYS]), flush=True)
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    if not has_torchvision(python):
        files = [file for file in files if "torchvision" not in file.read_text()]
        print(f"no torchvision fits: the tests of {len(files)} of {len(TESTS)} operators run")
    command = [python, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider", "-k", ONLY]
    try:
        done = subprocess.run(
            [*command, *files],
            cwd=ROOT,
            env=os.environ | {"FOCALOPS_CPU": "some", "OMP_WAIT_POLICY": "passive"},
            timeout=max(seconds, 1),
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        print(f"not done in {LIMIT // 60} minutes")
        return True


def has_torchvision(python: Path) -> bool:
    return not subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode


def output(command: list[str | Path]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
