"""Files of format version 1, written by an earlier commit, still load with the same numbers.

`tests/data/format_1` holds one small model in each scheme. `expected.json` has the SHA-256 of each tensor, dequantized
by the commit that wrote the files.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import fewbits

FOLDER = Path(__file__).parents[1] / "data" / "format_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


def digest(value):
    tensor = value if isinstance(value, torch.Tensor) else value.dequantize()
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_an_earlier_commit_loads_with_the_same_numbers(name):
    path = FOLDER / name if name == "sharded" else FOLDER / f"{name}.safetensors"
    assert {key: digest(value) for key, value in fewbits.load(path).items()} == EXPECTED[name]
    assert fewbits.verify(path).ok
