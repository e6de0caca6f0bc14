"""Virtual environments for the checks of a release, and the requirements of pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: `name[extra]>=version; marker`
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[.*\])?>=(?P<floor>[\w.]+)\s*(;(?P<marker>.*))?")


class Environment:
    """A fresh virtual environment.

    Args:
        folder: where to make it; an older one is removed.
        python: the interpreter, as a command or a path.
    """

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        self.folder = folder.resolve()
        self.bin = self.folder / "bin"

    def install(self, *requirements: str) -> None:
        """Install requirements with pip."""
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)

    def run(self, program: str, *arguments: str, directory: Path | None = None) -> str:
        """Run a program of the environment in a directory, and return its output. Its failure is an error."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        environment = inherited | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
        }
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, cwd=directory, env=environment, text=True, capture_output=True)
        if done.returncode:
            shown = " ".join([program, *arguments])
            raise SystemExit(f"FAILED with exit code {done.returncode}: {shown}\n{done.stdout}{done.stderr}")
        return done.stdout


def floors(extras: Iterable[str]) -> dict[str, str]:
    """Return the oldest versions that pyproject.toml allows, by package."""
    optional = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    found = map(REQUIREMENT.fullmatch, listed)
    return {match["name"]: match["floor"] for match in found if match}
