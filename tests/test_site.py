"""The site builds without a warning; a broken link, a page outside the navigation or a missing docstring is one."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fewbits

DOCS = Path(__file__).parents[1] / "docs"
NEEDED = ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "sphinx_design", "sphinxcontrib.mermaid")


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


pytestmark = pytest.mark.skipif(
    not all(map(is_installed, NEEDED)), reason="the site is built by Sphinx: pip install '.[docs]'"
)


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does, from the package that the tests import."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", docs, site]
    environment = {**os.environ, "PYTHONPATH": str(Path(fewbits.__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_site_builds_without_a_warning(tmp_path):
    done = build(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "fewbits.html").read_text(encoding="utf-8")
    assert 'id="fewbits.quantize"' in reference
    assert "--scheme" in (tmp_path / "site" / "reference" / "cli.html").read_text(encoding="utf-8")


def test_faults_are_errors(tmp_path):
    """A broken link, a page outside the navigation, an unknown name, a missing docstring, a forgotten public name."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    (docs / "index.md").write_text("# Home\n\n[nowhere](nowhere.md)\n")
    (docs / "stray.md").write_text("# Stray\n\n```{eval-rst}\n.. autofunction:: fewbits.no_such_name\n```\n")
    (docs / "bare.md").write_text("# Bare\n\n```{eval-rst}\n.. autofunction:: math.bare\n```\n")
    (docs / "conf.py").write_text((docs / "conf.py").read_text() + "\nimport math\n\nmath.bare = lambda: None\n")
    done = build(docs, tmp_path / "site")
    assert done.returncode == 1
    for fault in (
        "target not found: 'nowhere.md'",
        "stray.md: WARNING: document isn't included in any toctree",
        "no_such_name",
        "math.bare has no docstring",
        "no page of docs/reference has fewbits.quantize",
    ):
        assert fault in done.stderr
