"""``fewbits allocate``: settings that ``fewbits quantize`` takes, and options that contradict each other."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fewbits.cli import main


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"layers.{i}.{part}.weight": torch.randn(64, 64).exp() for i in range(2) for part in ("q_proj", "up_proj")
    }
    save_file({**tensors, "norm.weight": torch.ones(64)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["fewbits", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code, *capsys.readouterr()


def test_settings_are_those_of_quantize_to_the_byte(source, monkeypatch, capsys):
    plan, out = source.parent / "plan.toml", source.parent / "out.safetensors"
    code, printed, _ = run(monkeypatch, capsys, "allocate", source, "-o", plan, "--bits-per-weight", "5", "--json")
    planned = json.loads(printed)
    assert code == 0
    assert planned["bits_per_weight"] <= 5
    code, printed, _ = run(monkeypatch, capsys, "quantize", source, "-o", out, "--config", plan, "--json")
    written = json.loads(printed)
    assert code == 0
    assert written["ledger"] == planned["ledger"]


@pytest.mark.parametrize("suffix", ["svg", "json"])
def test_summary_table_and_curve_are_written(source, monkeypatch, capsys, suffix):
    curve = source.parent / f"curve.{suffix}"
    arguments = ["-o", source.parent / "p.json", "--target-size", "15kB", "--tensors", "--curve", curve, "-q"]
    code, printed, _ = run(monkeypatch, capsys, "allocate", source, *arguments)
    assert code == 0
    assert "bits per weight" in printed
    assert all(f"layers.{i}.q_proj.weight" in printed for i in range(2))
    text = curve.read_text()
    assert text.startswith("<svg") if suffix == "svg" else json.loads(text)["points"]


def test_candidates_are_named_with_groups_and_bits_of_scales(source, monkeypatch, capsys):
    names = ["--candidate", "nf4:32:6", "--candidate", "int4:64", "--candidate", "int8"]
    arguments = ["-o", source.parent / "p.toml", "--bits-per-weight", "6", *names, "--untied", "--json"]
    code, printed, _ = run(monkeypatch, capsys, "allocate", source, *arguments)
    assert code == 0
    assert {one["scheme"] for one in json.loads(printed)["weights"]} <= {"nf4:32:6", "int4:64", "int8"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "one budget"),
        (["--bits-per-weight", "4", "--target-size", "1MB"], "one budget"),
        (["--bits-per-weight", "1"], "raise the budget"),
        (["--bits-per-weight", "5", "--samples", "3"], "--samples needs --calibrate"),
        (["--bits-per-weight", "5", "--candidate", "nf4:a"], "SCHEME:GROUP_SIZE"),
        (["--bits-per-weight", "5", "--candidate", "nf9"], "a candidate is"),
        (["--bits-per-weight", "5", "--calibrate", "text.txt"], "directory of a transformers model"),
        (["--bits-per-weight", "5", "--curve", "curve.png"], ".svg or .json"),
        (["--bits-per-weight", "5", "--curve", "missing/curve.svg"], "does not exist"),
    ],
)
def test_wrong_options_write_nothing(source, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(source.parent)
    code, _, complaint = run(monkeypatch, capsys, "allocate", source, "-o", "plan.toml", *arguments)
    assert code == 2
    assert text in " ".join(complaint.split())
    assert [entry.name for entry in source.parent.iterdir()] == [source.name]


def test_an_existing_file_is_refused_before_any_work(source, monkeypatch, capsys):
    plan = source.parent / "plan.toml"
    plan.write_text("mine")
    code, _, complaint = run(monkeypatch, capsys, "allocate", source, "-o", plan, "--bits-per-weight", "5")
    assert code == 2
    assert "--replace" in complaint
    assert plan.read_text() == "mine"
    code, _, _ = run(monkeypatch, capsys, "allocate", source, "-o", plan, "--bits-per-weight", "5", "--replace")
    assert code == 0
    assert plan.read_text().startswith("# ")


def test_the_next_command_has_a_strategy_that_suits_few_bits(source, monkeypatch, capsys):
    arguments = ["allocate", source, "-o", source.parent / "p.toml", "--replace", "-q", "--bits-per-weight"]
    _, few, _ = run(monkeypatch, capsys, *arguments, "2.6")
    assert few.rstrip().endswith("--rounding scale-search")
    _, more, _ = run(monkeypatch, capsys, *arguments, "6")
    assert more.rstrip().endswith("p.toml")
