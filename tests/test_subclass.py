"""A scheme of an outside author, from subclass to file to a process that has never heard of it."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fewbits
from fewbits import Quantizer, QuantSpec
from support.lifecycle_helpers import mlp, read_header, snapshot


class Int6Grouped(Quantizer):
    """6 bits a weight, in groups of 64."""

    name = "int6"
    spec = QuantSpec(bits=6, granularity="group", group_size=64)


READER = """
    import sys
    import torch
    import fewbits

    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)).to("meta")
    fewbits.load(sys.argv[1], into=model)
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
    assert "test_subclass" not in sys.modules
"""


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128))


@pytest.fixture
def quantized():
    return fewbits.quantize(model(), Int6Grouped())


def test_the_whole_lifecycle_works(tmp_path):
    quantizer = Int6Grouped()
    quantizer.prepare(model())
    result = quantizer.convert()
    assert quantizer.validate().ok
    quantizer.save(tmp_path / "int6.safetensors")
    loaded = fewbits.load(tmp_path / "int6.safetensors", into=model())
    assert snapshot(loaded.state_dict()) == snapshot(result.state_dict())


def test_it_is_better_than_five_bits_and_worse_than_seven(quantized):
    def sqnr(bits):
        class Other(Int6Grouped):
            spec = QuantSpec(bits=bits, granularity="group", group_size=64)

        return fewbits.quantize(model(), Other()).report.sqnr_db

    assert sqnr(5) < quantized.report.sqnr_db < sqnr(7)


def test_the_file_holds_six_bits_a_weight(quantized, tmp_path):
    quantized.save(tmp_path / "int6.safetensors")
    entries, _, _ = read_header(tmp_path / "int6.safetensors")
    spent = sum(
        stop - start
        for name, entry in entries.items()
        for start, stop in [entry["data_offsets"]]
        if name.endswith(("weight_packed", "weight_shape"))
    )
    weights = sum(p.numel() for name, p in model().named_parameters() if name.endswith("weight"))
    assert 6.0 <= spent * 8 / weights <= 6.01


def test_the_ledger_and_the_report_name_the_scheme(quantized):
    assert {row.scheme for row in quantized.ledger if row.fate == "quantized"} == {"int6 group 64"}
    assert "int6 group 64" in str(quantized.report)


def test_a_process_without_the_subclass_computes_the_same_bits(quantized, tmp_path):
    x = torch.randn(4, 256)
    quantized.save(tmp_path / "int6.safetensors")
    torch.save(x, tmp_path / "x.pt")
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), *(tmp_path / n for n in ("int6.safetensors", "x.pt", "y.pt"))],
        check=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert torch.equal(torch.load(tmp_path / "y.pt"), quantized.model(x))


class Mixed(Quantizer):
    """A spec for each tensor, rounding of its own, and a reason in its own words."""

    name = "mixed"
    spec = QuantSpec(bits=4, granularity="channel")

    def spec_for(self, info):
        return self.spec if info.layout.columns > 16 else fewbits.CastSpec(torch.bfloat16)

    def quantize_tensor(self, weight, spec, observer):
        plain = super().quantize_tensor(weight, spec, observer)
        return fewbits.QuantizedTensor.from_codes(
            plain.codes(), plain.params(), spec=spec, layout=weight.layout, dtype=weight.dtype
        )


def test_a_scheme_may_choose_a_spec_for_each_tensor(tmp_path):
    result = fewbits.quantize(mlp(width=64), Mixed())
    assert (result.ledger["0.weight"].fate, result.ledger["0.weight"].scheme) == ("cast", "bfloat16")
    assert (result.ledger["2.weight"].fate, result.ledger["2.weight"].scheme) == ("quantized", "int4 channel")
    assert result.ledger["0.weight"].reason == "mixed chose bfloat16 for it"
    result.save(tmp_path / "mixed.safetensors")
    loaded = fewbits.load(tmp_path / "mixed.safetensors")
    assert loaded["0.weight"].dtype == torch.bfloat16
    assert loaded["2.weight"].equal(result.model[2].weight_stored.value())


def test_codes_that_do_not_round_to_nearest_break_the_bound():
    class Truncates(Int6Grouped):
        def quantize_tensor(self, weight, spec, observer):
            plain = super().quantize_tensor(weight, spec, observer)
            codes = (plain.codes() + 1).clamp(max=spec.code_max)
            return fewbits.QuantizedTensor.from_codes(
                codes, plain.params(), spec=spec, layout=weight.layout, dtype=weight.dtype
            )

    with pytest.raises(fewbits.errors.ValidationError, match=r"0\.weight: the error bound is broken"):
        fewbits.quantize(model(), Truncates())


def test_the_loaded_model_runs_where_the_quantized_one_did(quantized, tmp_path):
    quantized.save(tmp_path / "int6.safetensors")
    x = torch.randn(2, 256)
    assert torch.equal(fewbits.load(tmp_path / "int6.safetensors", into=model())(x), quantized.model(x))
