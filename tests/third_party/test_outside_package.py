"""A package from outside passes the kit and uses public names only."""

import ast
from pathlib import Path

import pytest
import torch
from codebooks import InputWeightedObserver, NormalCodebook, ShrinkRows, ZipSerializer

import fewbits
import fewbits.errors
import fewbits.extend
import fewbits.testing
from fewbits.testing import check_observer, check_quantizer, check_rounding, check_serializer

CHECKS = [
    *check_quantizer(NormalCodebook()),
    *check_quantizer(NormalCodebook(32, observer=InputWeightedObserver(), serializer=ZipSerializer())),
    *check_observer(InputWeightedObserver()),
    *check_rounding(ShrinkRows(), specs=fewbits.testing.specs(scale_dtype=None)),
    *check_serializer(ZipSerializer(), suffix=".zip"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.subject}-{check}")
def test_it_conforms(check):
    check()


def weights():
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0))


def test_a_codebook_is_better_than_even_levels_on_normal_weights():
    even = fewbits.quantize({"weight": weights()}, fewbits.Int4Grouped(64)).report
    uneven = fewbits.quantize({"weight": weights()}, NormalCodebook(64)).report
    assert uneven.sqnr_db > even.sqnr_db


def test_weighing_by_inputs_lowers_the_error_of_the_output():
    layer = torch.nn.Linear(512, 64, bias=False)
    layer.weight.data = weights()
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 512)

    def noise(**options):
        quantized = fewbits.quantize(layer, NormalCodebook(64, **options), data=[x]).model
        return (quantized(x) - layer(x)).square().sum()

    assert noise(observer=InputWeightedObserver()) < noise()
    assert noise(rounding=ShrinkRows()) < noise()


def test_an_archive_gives_back_the_quantized_tensors(tmp_path):
    result = fewbits.quantize({"weight": weights()}, NormalCodebook(serializer=ZipSerializer()))
    result.save(tmp_path / "model.zip")
    loaded = fewbits.load(tmp_path / "model.zip", serializer=ZipSerializer())
    assert loaded["weight"].equal(result.model["weight"])
    assert fewbits.verify(tmp_path / "model.zip", {"weight": weights()}, serializer=ZipSerializer()).ok


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_it_uses_public_names_only(path):
    public = {"fewbits", "fewbits.testing"} | {f"fewbits.{name}" for name in fewbits.__all__}
    for module in (fewbits.extend, fewbits.testing):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    public |= {f"fewbits.errors.{name}" for name in vars(fewbits.errors) if not name.startswith("_")}
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in used if name.split(".")[0] == "fewbits"} <= public
