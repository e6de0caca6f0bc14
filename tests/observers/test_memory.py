"""Calibration keeps statistics, never inputs: 500 batches need no more memory than 5."""

import subprocess
import sys

import pytest

# Measure the peak memory of a separate process by the kernel's count: Python's tools do not see torch's allocations.
SCRIPT = """
import sys
import torch
from torch import nn
from fewbits.calibration.running import run
from fewbits.calibration.watch import InputWatch
from fewbits.numerics.spec import INPUT_SPEC
from fewbits.observers import OBSERVERS

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
observers = [cls() for cls in OBSERVERS.values()]
watch = InputWatch([(f"{i}.weight", model[i], observer) for i in (0, 2) for observer in observers])
batches = (torch.randn(64, 1024) for _ in range(int(sys.argv[1])))
print(run(model, batches, samples=None).samples)
for observer in observers:
    observer.input_params(INPUT_SPEC)
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def peak_mib(batches):
    command = [sys.executable, "-c", SCRIPT, str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples, kib = map(int, done.stdout.split())
    assert samples == 64 * batches
    return kib / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_500_batches_need_no_more_memory_than_5():
    # The inputs of one layer would take 125 MiB if they were kept.
    assert peak_mib(500) < peak_mib(5) + 20
