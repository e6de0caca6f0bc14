"""What `fewbits quantize` says to try next, and that it helps."""

import json
import shlex
import sys

import pytest
import torch
from safetensors.torch import save_file

import fewbits
from fewbits.cli.advising import Advisor
from fewbits.cli.commands import run as run_cli
from fewbits.config.config import QuantizationConfig
from fewbits.numerics.dtypes import POWERS_OF_TWO


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(*seeds):
    return {f"w{seed}": torch.randn(32, 256, generator=torch.Generator().manual_seed(seed)) for seed in seeds}


def rough():
    """A weight that 4 bits for each row hold badly."""
    return torch.linspace(-1, 1, 256).repeat(4, 1) ** 15


@pytest.fixture
def printed(folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        run_cli()
        return capsys.readouterr().out

    return run


def quantized(printed, options):
    """The document of a run."""
    given = [part for pair in options.items() for part in pair]
    return json.loads(printed("quantize", "in", "-o", "out", "--replace", "--json", *given))


def option_of(advice):
    """The option and its value at the beginning of advice."""
    return shlex.split(advice.partition(",")[0])


def least(document):
    return min(tensor["sqnr_db"] for tensor in document["report"]["tensors"])


def test_each_step_loses_less_until_there_is_none(printed, folder):
    save_file(weights(1, 2), folder / "in")
    options, taken, before = {"--scheme": "int3", "--group-size": "128", "--fail-under": "90"}, [], -1.0
    while (document := quantized(printed, options))["advice"]:
        assert least(document) > before
        before = least(document)
        option, value = option_of(document["advice"])
        taken.append(f"{option} {value}")
        options[option] = value
    assert taken == [
        "--rounding scale-search",
        "--group-size 64",
        "--group-size 32",
        "--scheme int4",
        "--scheme nf4",
        "--scheme int5",
        "--scheme int6",
        "--scheme int7",
    ]


@pytest.mark.parametrize("scheme", ["int8-tensor", "int8", "fp8", *(["mxfp4"] if POWERS_OF_TWO else [])])
def test_a_scheme_without_settings_is_replaced_by_one_that_loses_less(printed, folder, scheme):
    save_file(weights(1, 2), folder / "in")
    document = quantized(printed, {"--scheme": scheme, "--fail-under": "90"})
    option, value = option_of(document["advice"])
    assert option == "--scheme"
    assert least(quantized(printed, {"--scheme": value})) > least(document)


def test_a_single_culprit_gets_a_scheme_of_its_own(printed, folder):
    even = torch.linspace(-1, 1, 256).repeat(4, 1)
    save_file({"a": even, "b": even.clone(), "lm head*.weight": rough()}, folder / "in")
    options = {"--scheme": "int4", "--group-size": "256", "--min-elements": "1"}
    document = quantized(printed, options)
    option, value = option_of(document["advice"])
    assert document["advice"].endswith("because it alone is below 20 dB")
    assert option == "--override"
    assert value == r"re:lm\ head\*\.weight=int8"
    better = quantized(printed, {**options, option: value})
    assert better["advice"] is None
    assert least(better) > 20


def test_a_good_result_gets_no_advice(printed, folder):
    save_file(weights(1), folder / "in")
    out = printed("quantize", "in", "-o", "out", "--scheme", "int8")
    assert "next" not in out
    assert quantized(printed, {"--scheme": "int8"})["advice"] is None


def test_advice_is_given_once(printed, folder):
    save_file({"a": rough(), "b": rough()}, folder / "in")
    out = printed("quantize", "in", "-o", "out", "--scheme", "int4", "--group-size", 256, "--min-elements", 1)
    lines = " ".join(out.split())
    assert "2 of 2 tensors are below 20 dB" in lines
    assert lines.endswith("to try next: --rounding scale-search, which loses less than plain rounding at the same size")
    assert lines.count("smaller groups") == lines.count("in Python") - 1 == 0
    # A check of the file knows no options, so it gives the general advice.
    assert "smaller groups, or int8 lose less" in " ".join(printed("verify", "out", "--against", "in").split())


def poor_report(**settings):
    given = {"group_size": 256, "min_elements": 1} | settings
    return fewbits.quantize({"a": rough(), "b": rough()}, "int4", **given).report


def test_a_directory_of_a_transformers_model_is_calibrated_first(folder):
    (folder / "config.json").write_text("{}")
    settings = QuantizationConfig(scheme="int4", group_size=256)
    expected = "--calibrate TEXT --rounding qronos, "
    assert not (Advisor(folder, settings).advice(poor_report()) or "").startswith(expected)
    (folder / "tokenizer.json").write_text("{}")
    assert (Advisor(folder, settings).advice(poor_report()) or "").startswith(expected)
    calibrated = Advisor(folder, settings.replace(rounding="gptq"), calibrated=True)
    assert (calibrated.advice(poor_report()) or "").startswith("--group-size 128, ")


def test_another_format_is_not_told_schemes_that_it_may_not_have(folder):
    settings = QuantizationConfig(scheme="int4", group_size=32, rounding="scale-search")
    report = poor_report(group_size=32, fail_under=60, on_failure="ignore")
    assert (Advisor(folder, settings).advice(report) or "").startswith("--scheme nf4, ")
    assert Advisor(folder, settings, format="gguf").advice(report) is None


def test_a_missed_limit_is_poor_even_if_every_tensor_is_good(folder):
    report = fewbits.quantize(weights(1, 2), "int8").report
    advisor = Advisor(folder, QuantizationConfig(scheme="int8"))
    assert advisor.advice(report) is None
    assert (advisor.advice(report, missed=True) or "").startswith("--scheme fp16, ")
