"""The documents of `--json` have the fields that docs/cli.md lists."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.cli.commands import cli
from fewbits.cli.commands import run as run_cli
from support.compressed import Recipe, config, quantized, write

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (`fewbits \w+.*?) \| (.*?) \|$", PAGE, re.MULTILINE))
QUANTIZE = ["quantize", "in", "--scheme", "int8"]


@pytest.fixture
def document(tmp_path, monkeypatch, capsys):
    """Run a command with `--json`, in a directory with a checkpoint, a result, and one of another tool."""
    monkeypatch.chdir(tmp_path)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": weight}, "in")
    recipe = Recipe(8, None)
    write(tmp_path / "foreign", quantized({"a.weight": weight}, recipe, ("a.weight",)), config(recipe))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *arguments, "--json"])
        assert run_cli() == 0
        return json.loads(capsys.readouterr().out)

    run(*QUANTIZE, "-o", "small")
    return run


@pytest.mark.parametrize(
    ("row", "command"),
    [
        ("`fewbits quantize`", [*QUANTIZE, "-o", "out"]),
        ("`fewbits quantize --dry-run`", [*QUANTIZE, "--dry-run"]),
        ("`fewbits inspect`, of a result of fewbits", ["inspect", "small"]),
        ("`fewbits inspect`, of another tool's file", ["inspect", "foreign"]),
        ("`fewbits verify`", ["verify", "small", "--against", "in"]),
        ("`fewbits convert`", ["convert", "small", "-o", "out", "--format", "compressed-tensors", "--allow"]),
        ("`fewbits allocate`", ["allocate", "in", "-o", "plan.toml", "--bits-per-weight", "5"]),
        ("`fewbits report`", ["report", "small", "-o", "page.html"]),
        ("`fewbits completion`", ["completion", "fish"]),
    ],
)
def test_a_document_has_the_fields_of_its_row(document, row, command):
    assert list(document(*command)) == re.findall(r"`(\w+)`", ROWS[row])


def test_a_result_in_another_format_has_exported_in_place_of_opens_in(document):
    plain = document(*QUANTIZE, "-o", "out")
    exported = document(*QUANTIZE, "-o", "other", "--format", "compressed-tensors", "--allow")
    assert plain.keys() ^ exported.keys() == {"exported", "opens_in"}
    assert "`exported` in place of `opens_in`" in ROWS["`fewbits quantize --format`"]


def test_the_table_has_every_command():
    assert {row.split("`")[1].split()[1] for row in ROWS} == set(cli.commands)
