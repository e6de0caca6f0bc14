"""The independent reader in examples/ decodes files like the library."""

import json
import runpy
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors import safe_open
from torch import nn

import fewbits
from fewbits.numerics.dtypes import POWERS_OF_TWO

ROOT = Path(__file__).parent.parent
read = runpy.run_path(str(ROOT / "examples" / "reader.py"))["read"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 48)
        self.conv = nn.Conv2d(6, 8, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 12, 3, groups=2)
        self.head = nn.Linear(48, 20)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.arange(3), persistent=False)


SCHEMES = [
    fewbits.Int8PerTensor(),
    fewbits.Int8PerChannel(scale_dtype=torch.bfloat16),
    fewbits.Int4Grouped(20, skip_types=()),
    fewbits.Int4Grouped(20, symmetric=False, skip_types=()),
    fewbits.schemes.IntNGrouped(3, 20, scale_dtype=torch.float16, skip_types=()),
    fewbits.schemes.NF4Grouped(20, skip_types=()),
    fewbits.schemes.FP8PerChannel(),
    *([] if POWERS_OF_TWO is None else [fewbits.schemes.MXFP4Grouped(skip_types=())]),
    fewbits.Int4Grouped(5, scale_bits=6, skip_types=()),
    fewbits.Int4Grouped(5, scale_bits=3, symmetric=False, skip_types=()),
    fewbits.FP16Cast(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("quantizer", SCHEMES, ids=lambda quantizer: quantizer.name)
def test_the_reader_in_34_lines_decodes_the_same_values_as_the_library(
    tmp_path: Path, quantizer: fewbits.Quantizer, dtype: torch.dtype
) -> None:
    quantizer.reset()
    quantizer.prepare(Tied().to(dtype))
    quantizer.convert()
    path = tmp_path / "model.safetensors"
    quantizer.save(path)
    mine, theirs = fewbits.load(path), read(path)
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        decoded = value.dequantize() if isinstance(value, fewbits.QuantizedTensor) else value
        assert torch.equal(decoded, theirs[name]), name


@pytest.mark.parametrize("quantizer", SCHEMES, ids=lambda quantizer: quantizer.name)
def test_metadata_follows_its_schema(tmp_path: Path, quantizer: fewbits.Quantizer) -> None:
    quantizer.reset()
    quantizer.prepare(Tied())
    quantizer.convert()
    quantizer.validate()
    quantizer.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    plain = ("format", "fewbits.header_digest")
    parsed = {key: value if key in plain else json.loads(value) for key, value in metadata.items()}
    schema = json.loads((ROOT / "docs" / "metadata.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(parsed)


def test_the_reader_has_34_lines() -> None:
    lines = (ROOT / "examples" / "reader.py").read_text().splitlines()
    assert sum(bool(line.strip()) and not line.strip().startswith('"""') for line in lines) <= 34
