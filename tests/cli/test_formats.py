"""``fewbits quantize --format``: quantize and convert in one command."""

import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.cli.commands import run as run_cli
from fewbits.formats.compressed_checkpoint import CompressedCheckpoint
from fewbits.numerics.tensor import QuantizedTensor, same_bits

ARGUMENTS = ["--scheme", "int4", "--group-size", 32, "-q"]
FORMAT = ["--format", "compressed-tensors"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a float model `in` and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (48, 64), "a.bias": (48,), "b.weight": (16, 64), "embed.weight": (96, 64)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama", "vocab_size": 96}')
    return tmp_path


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr("fewbits.cli.progress.monotonic", lambda: 0.0)  # a slow machine would print progress
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        code = run_cli()
        return code, *capsys.readouterr()

    return run


def test_quantize_with_a_format_gives_the_codes_of_quantize_and_convert(cli, folder):
    code, out, err = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT)
    assert (code, err) == (0, "")
    size = sum(path.stat().st_size for path in (folder / "out").iterdir())
    assert f"out (compressed-tensors): 2 quantized and 2 other tensors, {size:,} bytes, read back and equal\n" in out
    assert "opens" not in out
    assert sorted(os.listdir(folder)) == ["in", "out"]
    fewbits.quantize("in", "int4", group_size=32, output="small")
    fewbits.convert("small", "twice", "compressed-tensors")
    for file in ("model.safetensors", "config.json"):
        assert (folder / "out" / file).read_bytes() == (folder / "twice" / file).read_bytes()


def test_a_rounding_strategy_keeps_its_codes_in_another_format(cli, folder):
    rounding = ["--rounding", "scale-search"]
    assert cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT, *rounding)[0] == 0
    fewbits.quantize("in", "int4", group_size=32, output="small", rounding="scale-search")
    found = CompressedCheckpoint("out")
    for name, value in fewbits.load("small").items():
        if isinstance(value, QuantizedTensor):
            assert same_bits(found.value(name).packed, value.packed)
            assert same_bits(found.value(name).scale, value.scale)


def test_json_names_the_output_and_the_export(cli):
    code, out, _ = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT, "--json")
    printed = json.loads(out)
    assert (code, printed["output"], printed["report"]["ok"]) == (0, "out", True)
    assert (printed["exported"]["path"], printed["exported"]["format"]) == ("out", "compressed-tensors")
    assert "opens_in" not in printed


def test_a_single_file_is_exported_too(cli, folder):
    arguments = ["quantize", "in/model.safetensors", "-o", "out", *ARGUMENTS, *FORMAT]
    code, _, err = cli(*arguments)
    assert code == 2
    assert "config.json of a transformers model is not beside the weights" in err
    assert os.listdir(folder) == ["in"]
    assert cli(*arguments, "--allow")[0] == 0
    assert sorted(os.listdir(folder)) == ["in", "out"]
    assert sorted(os.listdir(folder / "out")) == ["config.json", "model.safetensors"]


def test_shards_have_the_given_size(cli, folder):
    assert cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT, "--max-shard-size", "2kB")[0] == 0
    assert len([*(folder / "out").glob("*.safetensors")]) > 1
    assert "model.safetensors.index.json" in os.listdir(folder / "out")


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_obstacles_are_refused_before_anything_is_quantized(cli, folder, dry_run):
    code, out, err = cli("quantize", "in", "-o", "out", "--scheme", "int8", "-q", *FORMAT, *dry_run)
    assert (code, out) == (2, "")
    assert "embed.weight is a quantized embedding" in " ".join(err.split())
    assert os.listdir(folder) == ["in"]


def test_a_dry_run_shows_the_plan(cli, folder):
    code, out, err = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT, "--dry-run")
    assert (code, err) == (0, "")
    assert "nothing was written" in out
    assert os.listdir(folder) == ["in"]


def test_an_interrupted_export_resumes_without_quantizing_again(cli, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fewbits.conversion.exporting.copy_config", interrupt)
        code, _, err = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT)
    assert code == 2
    assert "the quantized weights are kept: continue with --resume" in " ".join(err.split())
    kept = [name for name in os.listdir(folder) if name != "in"]
    assert len(kept) == 1
    code, _, err = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT)
    assert code == 2
    assert "Continue it (--resume), or start over (--replace)" in " ".join(err.split())
    code, out, _ = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT, "--resume", "--json")
    assert (code, json.loads(out)["converted"]["bytes"]) == (0, 0)
    assert sorted(os.listdir(folder)) == ["in", "out"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_existing_results_are_replaced_on_request_only(cli, folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    arguments = ["quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT]
    assert cli(*arguments)[0] == 2
    assert os.listdir(folder / "out") == ["mine.txt"]
    assert cli(*arguments, "--replace")[0] == 0
    assert "mine.txt" not in os.listdir(folder / "out")
    assert sorted(os.listdir(folder)) == ["in", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out", "--allow"], "--allow needs --format"),
        (["--dry-run", *FORMAT], "--format needs '-o' / '--output'"),
        (["-o", "out", "--format", "gptq"], "'compressed-tensors'"),
        (["-o", "in", *FORMAT], "is the source"),
    ],
)
def test_options_that_do_not_fit_are_refused(cli, folder, arguments, message):
    code, out, err = cli("quantize", "in", *ARGUMENTS, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert os.listdir(folder) == ["in"]


def test_several_processes_are_refused(cli, monkeypatch):
    monkeypatch.setattr("fewbits.cli.quantizing.join_group", lambda: 1)
    code, _, err = cli("quantize", "in", "-o", "out", *ARGUMENTS, *FORMAT)
    assert code == 2
    assert "--format runs in one process" in err
