"""``fewbits report``: the page, what is printed, and the exit codes."""

import json
import os
import sys

import pytest
import safetensors.torch

from fewbits.cli.commands import run as run_cli
from support.checkpoints import state


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run the command line in a directory with a source `in` and a result `out`."""
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state().items()}, "in")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        code = run_cli()
        return code, *capsys.readouterr()

    assert run("quantize", "in", "-o", "out", "--scheme", "int8", "--min-elements", 1)[0] == 0
    return run


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_page_is_written_once_and_then_only_with_replace(cli, tmp_path):
    code, out, err = cli("report", "out", "-o", "a.html", "--against", "in")
    assert (code, err) == (0, "")
    assert out.startswith("passed")
    assert out.endswith("written: a.html\n")
    first = (tmp_path / "a.html").read_bytes()
    code, out, err = cli("report", "out", "-o", "a.html")
    assert (code, out) == (2, "")
    assert "a.html exists" in err
    assert (tmp_path / "a.html").read_bytes() == first
    assert cli("report", "out", "-o", "a.html", "--against", "in", "--replace")[0] == 0
    assert (tmp_path / "a.html").read_bytes() == first
    assert sorted(os.listdir()) == ["a.html", "in", "out"]


def test_with_json_standard_output_is_one_document(cli, tmp_path):
    code, out, _ = cli("report", "out", "-o", "a.html", "--json")
    printed = json.loads(out)
    assert (code, printed["output"], printed["report"]["ok"]) == (0, "a.html", True)
    assert printed["bytes"] == (tmp_path / "a.html").stat().st_size


def test_a_failed_result_has_a_page_and_exit_code_1(cli, tmp_path):
    damage(tmp_path / "out")
    code, out, _ = cli("report", "out", "-o", "a.html")
    assert code == 1
    assert out.startswith("FAILED")
    text = (tmp_path / "a.html").read_text()
    assert "Failed: 1 failure" in text
    assert "are not the bytes that were written" in text


def test_a_limit_applies_to_the_page(cli, tmp_path):
    assert cli("report", "out", "-o", "a.html", "--against", "in", "--fail-under", 99)[0] == 1
    assert "is below 99 dB" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("out", "-o", "a.txt"), "must end in .html"),
        (("out", "-o", "out", "--replace"), "must end in .html"),
        (("out", "-o", "nowhere/a.html"), "does not exist"),
        (("in", "-o", "a.html"), "was not written by fewbits"),
        (("out", "-o", "a.html", "--entry", "model"), "--against"),
        (("out", "-o", "a.html", "--against", "missing"), "missing"),
        (("out", "-o", "a.html", "--curve", "missing.json"), "missing.json"),
        (("out", "-o", "a.html", "--curve", "in"), "no JSON"),
    ],
)
def test_a_report_that_cannot_be_made_leaves_nothing(cli, arguments, said):
    code, out, err = cli("report", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(os.listdir()) == ["in", "out"]


def test_a_missing_package_is_told_before_the_files_are_read(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("fewbits.cli.reporting.verify", None)
    code, _, err = cli("report", "out", "-o", "a.html")
    assert code == 2
    assert "fewbits[report]" in err


def test_a_directory_of_several_files(cli, tmp_path):
    assert cli("quantize", "in", "-o", "many", "--scheme", "int8", "--max-shard-size", "20kB", "-q")[0] == 0
    assert cli("report", "many", "-o", "a.html", "--against", "in", "-q")[0] == 0
    text = (tmp_path / "a.html").read_text()
    assert all(file in text for file in os.listdir("many") if file.endswith(".safetensors"))
