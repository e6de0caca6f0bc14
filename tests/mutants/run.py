"""Break the code on purpose, and check that the tests notice: ``python tests/mutants/run.py [PATCH...]``.

Every patch in this folder is applied to a copy of the project, where the tests run. A mutant survives if the tests
pass. It is stale if it no longer applies, or if the package can no longer be imported, which would prove nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
#: The tests of `make test`, those first that kill most mutants: collecting all tests takes a minute.
STAGES = (
    ("tests/numerics",),
    (
        "tests/selection",
        "tests/checkpoint",
        "tests/quantizers/test_resume.py",
        "tests/observers",
        "tests/kernels",
        "tests/nn/test_swap.py",
        "tests/test_hidden_references.py",
        "tests/calibration/test_block_by_block.py",
    ),
    ("tests", "src/fewbits"),
)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the project, with the copy's own package."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def tests(folder: Path, stages: Sequence[Sequence[str]]) -> subprocess.CompletedProcess[str]:
    """Run stages of tests up to the first failure."""
    jobs = ["-n", os.environ.get("JOBS", "2"), "--dist", "worksteal"]
    for stage in stages:
        done = run(folder, "-m", "pytest", "-q", "-x", "-m", "not slow", *jobs, *stage)
        if done.returncode:
            break
    return done


def verdict(patch: Path | None) -> str:
    """Return the fate of a mutant, or of the unchanged project for None."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        if patch is not None:
            applied = subprocess.run(["git", "apply", str(patch)], cwd=folder, capture_output=True, text=True)
            if applied.returncode:
                return f"stale: it does not apply: {applied.stderr.strip()}"
        imported = run(folder, "-c", "import fewbits; print(fewbits.__file__)")
        if imported.returncode or not imported.stdout.startswith(str(folder)):
            return f"stale: fewbits cannot be imported from the copy: {imported.stderr.strip()[-200:]}"
        # The last stage runs all tests. The unchanged project needs no earlier stage.
        done = tests(folder, STAGES[-1:] if patch is None else STAGES)
    if done.returncode == 0:
        return "survived"
    # After the first failure pytest exits as if interrupted, but its summary names the failed test.
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if not failed:
        return f"stale: the tests did not run (pytest exited {done.returncode}): {done.stdout[-500:]}"
    return f"killed by {failed[0]}"


def main(names: list[str]) -> int:
    """Try all mutants, or the named ones.

    Returns:
        the number of mutants that were not killed.
    """
    patches = [Path(name).resolve() for name in names] or sorted(HERE.glob("*.patch"))
    if not patches:
        print("there is no patch to try")
        return 1
    unharmed = verdict(None)
    print(f"the unchanged project: {unharmed}", flush=True)
    if unharmed != "survived":
        return 1
    alive = 0
    for patch in patches:
        found = verdict(patch)
        alive += not found.startswith("killed")
        print(f"{patch.stem}: {found}", flush=True)
    print(f"{len(patches) - alive} of {len(patches)} mutants were killed")
    return alive


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
