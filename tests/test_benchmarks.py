"""The benchmarks whose figures are promises, not timings."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_converting_a_gibibyte_peaks_within_64_mb_of_source_and_result() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("int4") == run.stdout.count("int8") == 2
