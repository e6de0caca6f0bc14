"""Break the code on purpose and see that the tests notice: ``python tests/mutants/run.py [PATCH...]``.

Every patch in this folder is applied to a copy of the project, in which the tests are run. A mutant survives if they
pass; it is stale if it no longer applies, or if the package cannot be imported any more, which proves nothing.
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
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
#: What `make test` runs, in the order in which most mutants die soonest: to collect all tests takes a minute by itself.
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
    ),
    ("tests", "src/fewbits"),
)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the project, with the copy's own package."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def tests(folder: Path, stages: Sequence[Sequence[str]]) -> subprocess.CompletedProcess[str]:
    """Some of what `make test` runs, up to the first failure."""
    jobs = ["-n", os.environ.get("JOBS", "2"), "--dist", "worksteal"]
    for stage in stages:
        done = run(folder, "-m", "pytest", "-q", "-x", "-m", "not slow", *jobs, *stage)
        if done.returncode:
            break
    return done


def verdict(patch: Path | None) -> str:
    """What became of one mutant; of the project as it is, for None."""
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
        # The last stage is all tests: unharmed, nothing is to be found sooner.
        done = tests(folder, STAGES[-1:] if patch is None else STAGES)
    if done.returncode == 0:
        return "survived"
    # Stopped at the first failure, pytest exits as if it had been interrupted: what failed is in its summary.
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if not failed:
        return f"stale: the tests did not run (pytest exited {done.returncode}): {done.stdout[-500:]}"
    return f"killed by {failed[0]}"


def main(names: list[str]) -> int:
    """Try all mutants, or those that are named.

    Returns:
        how many were not killed.
    """
    patches = [Path(name).resolve() for name in names] or sorted(HERE.glob("*.patch"))
    if not patches:
        print("there is no patch to try")
        return 1
    unharmed = verdict(None)
    print(f"the project as it is: {unharmed}", flush=True)
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
