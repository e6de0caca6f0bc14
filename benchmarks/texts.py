"""Texts that every machine with Python or Debian has: two to evaluate on, one to calibrate on, one to hold out.

Calibration and evaluation never overlap: `docstrings` has no text of `topics`, and the others have other authors.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

#: Of Debian's package debian-history: a history of the project, in plain sentences.
PROSE = Path("/usr/share/doc/debian-history/docs/project-history.en.txt.gz")

#: Packages of the standard library, whose modules are read too, and modules.
_PACKAGES = "asyncio concurrent email http importlib json logging multiprocessing unittest xml"
_MODULES = """
    argparse ast calendar collections configparser contextlib csv ctypes datetime decimal difflib dis doctest enum
    fractions functools gettext heapq inspect ipaddress itertools locale mailbox optparse pathlib pickle pickletools
    platform queue random re sched selectors shelve shutil smtplib socket sqlite3 ssl statistics string subprocess
    sysconfig tarfile tempfile textwrap threading timeit tokenize traceback turtle typing urllib.request uuid weakref
    zipfile zoneinfo
"""


def topics() -> str:
    """Evaluation: the language reference that Python's `help` shows."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prose(path: Path = PROSE) -> str:
    """Evaluation: sentences, not documentation of programs."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; install Debian's package debian-history, or pass --prose")
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def docstrings() -> str:
    """Calibration: docstrings of the standard library, each once, in the order of their digests.

    A process without other packages reads them: torch and others replace functions of the standard library. Another
    version of Python has other texts, and leaves the order of the rest.
    """
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout


def _all_docstrings() -> str:
    found = {text for module in _modules() for text in _docstrings(module) if len(text) > 80}
    return "\n\n".join(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


def descriptions(most: int = 8000) -> str:
    """Held out in tuning: how installed packages describe themselves, the beginning of each."""
    found = {d.metadata["Name"]: d.metadata.get_payload() for d in importlib.metadata.distributions()}
    texts = [found[name][:most] for name in sorted(found) if isinstance(found[name], str) and len(found[name]) > 3000]
    return "\n\n".join(texts)


def _modules() -> Iterator[ModuleType]:
    names = _MODULES.split()
    for package in _PACKAGES.split():
        names += [package, *(f"{package}.{info.name}" for info in pkgutil.iter_modules(_path(package)))]
    for name in sorted(names):
        if not name.endswith("__main__"):
            try:
                with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    warnings.simplefilter("ignore")
                    yield importlib.import_module(name)
            except ImportError:  # of another platform, or without an optional library
                continue


def _path(package: str) -> list[str]:
    return list(importlib.import_module(package).__path__)


def _docstrings(module: ModuleType) -> Iterator[str]:
    for _, value in sorted(vars(module).items()):
        members = [member for _, member in sorted(vars(value).items())] if inspect.isclass(value) else []
        for documented in (value, *members):
            if inspect.isclass(documented) or inspect.isroutine(documented):
                try:
                    yield inspect.getdoc(documented) or ""
                except Exception:  # a descriptor that computes its text
                    continue


if __name__ == "__main__":
    sys.stdout.buffer.write(_all_docstrings().encode())
