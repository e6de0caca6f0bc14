"""Build the wheel and the sdist, and use them as a user would: `make release-check`.

Both are installed into fresh environments and used from another directory, without the sources: the README's code and
commands, and a selection of tests. It takes some minutes and needs a package index.
"""

import argparse
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from release.environments import ROOT, Environment, floors
from support.markdown import blocks

PACKAGE = ROOT / "src" / "fewbits"
#: Files of the sdist beside the package, for those who build or test it.
OF_SOURCE = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "Makefile",
    "tests/conftest.py",
    "docs/guide/runs.md",
)
#: Tests that run without the sources, and the packages that they need.
TESTS = ("tests/test_api.py", "tests/test_imports.py", "tests/cli/test_cli.py")
FOR_TESTS = ("pytest", "hypothesis", "numpy")
#: Code of the README that needs packages beyond the extra `cli`.
NEEDS_MORE = re.compile(r"transformers")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default="torch", help="the requirement for torch, such as torch==2.13.0")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the fresh environments")
    arguments = parser.parse_args(argv)
    folder = ROOT / "build" / "release"
    wheel, sdist = built(folder)
    complaints = version_complaints(wheel, sdist)
    complaints += [*wheel_complaints(names_in(wheel)), *sdist_complaints(names_in(sdist))]
    if complaints:
        raise SystemExit("\n".join(f"FAILED: {complaint}" for complaint in complaints))
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {sdist.name}: {sdist.stat().st_size:,} bytes")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "dist", filter="data")
    sources = folder / "dist" / sdist.name.removesuffix(".tar.gz")
    for artefact in (wheel, sdist):
        environment = Environment(folder / f"installed-{artefact.suffix[1:]}", arguments.python)
        environment.install(arguments.torch, *FOR_TESTS)
        # The cache of pip may hold a wheel that was built from an earlier sdist of the same name.
        environment.install("--no-cache-dir", f"fewbits[cli] @ {artefact.as_uri()}")
        with tempfile.TemporaryDirectory() as elsewhere:
            use(environment, Path(elsewhere), sources)
        print(f"{artefact.name}: installed, README and {len(TESTS)} files of tests passed")
    return 0


def built(folder: Path) -> tuple[Path, Path]:
    """Build both in an environment of their own."""
    shutil.rmtree(folder / "dist", ignore_errors=True)
    environment = Environment(folder / "build")
    environment.install(*(f"{name}>={floor}" for name, floor in floors(["release"]).items() if name == "build"))
    environment.run("python", "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
    [wheel], [sdist] = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def names_in(artefact: Path) -> list[str]:
    """Return the names of all files, those of an sdist without its first folder."""
    if artefact.suffix == ".whl":
        return zipfile.ZipFile(artefact).namelist()
    with tarfile.open(artefact) as archive:
        return [member.name.partition("/")[2] for member in archive if member.isfile()]


def version() -> str:
    """Return the version, from the only place that has it."""
    found = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "_version.py").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1]


def changelog_version(text: str) -> str:
    """Return the version of the newest entry of a changelog."""
    found = re.search(r"^## \[?([\w.]+)", text, re.MULTILINE)
    return found[1] if found else "no version"


def version_complaints(wheel: Path, sdist: Path) -> list[str]:
    """Compare the version everywhere."""
    metadata = next(name for name in names_in(wheel) if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    found = {
        "the newest entry of CHANGELOG.md": changelog_version((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        "the wheel's metadata": re.search(r"^Version: (.+)$", text, re.MULTILINE)[1],
        wheel.name: wheel.name.split("-")[1],
        sdist.name: sdist.name.removesuffix(".tar.gz").split("-")[1],
    }
    return [f"{where} has version {other}, not {version()}" for where, other in found.items() if other != version()]


def package_files() -> set[str]:
    """Return the files of the package, as a wheel names them."""
    found = (path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.suffix != ".pyc"}


def wheel_complaints(names: Iterable[str]) -> list[str]:
    """A wheel has the package, its license and metadata, and nothing else."""
    info, names = f"fewbits-{version()}.dist-info/", set(names)
    own = {name for name in names if not name.startswith(info)}
    missing = {*package_files(), f"{info}licenses/LICENSE", f"{info}entry_points.txt", "fewbits/py.typed"} - names
    complaints = [f"the wheel lacks {name}" for name in sorted(missing)]
    return complaints + [f"the wheel has {name}" for name in sorted(own - package_files())]


def sdist_complaints(names: Iterable[str]) -> list[str]:
    """An sdist has all sources, and no product of a build."""
    wanted = {*OF_SOURCE, *(f"src/{name}" for name in package_files())}
    names, products = set(names), {"build", "dist", ".venv", "__pycache__"}
    complaints = [f"the sdist lacks {name}" for name in sorted(wanted - names)]
    return complaints + [f"the sdist has {name}" for name in sorted(names) if products & set(PurePosixPath(name).parts)]


def use(environment: Environment, folder: Path, sources: Path) -> None:
    """Use an installed fewbits from a folder that has only the tests and the README of the sdist."""
    where = environment.run("python", "-c", "import fewbits; print(fewbits.__file__)", directory=folder).strip()
    if environment.folder not in Path(where).parents:
        raise SystemExit(f"FAILED: fewbits was imported from {where}, outside {environment.folder}")
    for command in (["fewbits"], ["python", "-m", "fewbits"]):
        said = environment.run(*command, "--version", directory=folder).strip()
        if said != f"fewbits, version {version()}":
            raise SystemExit(f"FAILED: {' '.join(command)} --version printed {said!r}")
    environment.run("python", "-m", "pip", "check")
    run_readme(environment, folder, (sources / "README.md").read_text(encoding="utf-8"))
    shutil.copytree(sources / "tests", folder / "tests")
    shutil.copy(sources / "pyproject.toml", folder)
    environment.run("python", "-m", "pytest", "-q", "-m", "not slow", *TESTS, directory=folder)


def run_readme(environment: Environment, folder: Path, text: str) -> None:
    """Run the code of a README that needs no more packages, then its commands."""
    found = list(blocks(text))
    code = [block.source for block in found if block.language == "python" and not NEEDS_MORE.search(block.source)]
    console = "\n".join(block.source for block in found if block.language == "console")
    commands = re.findall(r"^\$ fewbits (.+)$", console, re.MULTILINE)
    if len(code) < 4 or len(commands) < 4:
        raise SystemExit(f"FAILED: the README has {len(code)} blocks of code and {len(commands)} commands to run")
    (folder / "readme.py").write_text("\n".join(code), encoding="utf-8")
    environment.run("python", "readme.py", directory=folder)
    for command in commands:
        environment.run("fewbits", *command.split(), directory=folder)


if __name__ == "__main__":
    sys.exit(main())
