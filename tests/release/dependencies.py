"""Run a short selection of tests with the oldest or the newest dependencies that pyproject.toml allows.

    PYTHONPATH=tests python -m release.dependencies oldest --python python3.10
    PYTHONPATH=tests python -m release.dependencies newest --python python3.13 --torch torch==2.13.0

Each run makes an environment below build/release/ and takes some minutes. Tests of packages that are not installed are
left out.
"""

import argparse
import subprocess
import sys

from release.environments import ROOT, Environment, floors

#: Extras of users whose oldest versions are tried, and packages that the tests need.
EXTRAS = ("cli", "toml", "testing")
FOR_TESTS = ("pytest", "numpy")

TESTS = (
    "tests/numerics/test_affine.py",
    "tests/numerics/test_spec.py",
    "tests/selection",
    "tests/checkpoint/test_saving.py",
    "tests/checkpoint/test_loading.py",
    "tests/quantizers/test_schemes.py",
    "tests/nn/test_modules.py",
    "tests/kernels/test_ops.py",
    "tests/test_api.py",
    "tests/test_config.py",
    "tests/test_events.py",
    "tests/test_imports.py",
    "tests/cli",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("which", choices=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter")
    parser.add_argument("--torch", default=None, help="another requirement for torch, such as torch==2.13.0")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="tests to run in place of the selection")
    arguments = parser.parse_args(argv)
    ask = [arguments.python, "-c", "import platform; print(platform.python_version())"]
    python = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    environment = Environment(ROOT / "build" / "release" / f"{arguments.which}-{python}", arguments.python)
    versions = {**floors(EXTRAS), **{name: floors(["dev"])[name] for name in FOR_TESTS}}
    pinned = [f"{name}=={floor}" if arguments.which == "oldest" else name for name, floor in versions.items()]
    if arguments.torch:
        pinned = [arguments.torch if line.partition("=")[0] == "torch" else line for line in pinned]
    environment.install(*pinned)
    environment.install("--no-deps", str(ROOT))
    print(environment.run("python", "-m", "pip", "list", "--disable-pip-version-check"))
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    print(environment.run("python", "-m", "pytest", *options, *arguments.tests, directory=ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
