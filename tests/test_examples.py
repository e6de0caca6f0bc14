"""Every example runs as it stands, in an empty directory."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))  # none at all is an error: see pyproject

# Packages that the dev extra does not install, because they are large or bring many others.
OPTIONAL = {"lightning_callback.py": "lightning", "diffusers_quantizer.py": "diffusers"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    needed = OPTIONAL.get(path.name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{path.name} exited {done.returncode}\n{done.stdout}{done.stderr}"
