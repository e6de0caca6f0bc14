"""Standard output that is full, closed, or not read: the work is finished, and the exit code tells."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import fewbits
from fewbits.cli import main
from fewbits.cli.streams import Stdout

QUANTIZE = ["quantize", "in.safetensors", "-o", "out.safetensors", "--scheme", "int8"]
VERIFY = ["verify", "out.safetensors", "--against", "in.safetensors"]
FULL = "standard output cannot be written: No space left on device"
DONE = "; everything else succeeded"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"weight": torch.randn(40, 64, generator=torch.Generator().manual_seed(0))}, "in.safetensors")
    return tmp_path


@pytest.fixture
def quantized(folder):
    fewbits.quantize("in.safetensors", "int8", output="out.safetensors")
    return folder


# Own processes, because the exit of Python is part of the test.


def run(redirection):
    """``fewbits quantize``, started by a shell that redirects its streams."""
    script = f'"$@" {redirection}'
    command = ["bash", "-o", "pipefail", "-c", script, "bash", sys.executable, "-m", "fewbits", *QUANTIZE]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("> /dev/full", 2, f"fewbits: {FULL}{DONE}\n"),
        ("| true", 141, ""),
        (">&- 2>&-", 2, ""),
    ],
)
def test_a_file_is_complete_even_if_standard_output_fails(folder, redirection, code, said):
    done = run(redirection)
    assert (done.returncode, done.stderr) == (code, said)
    written = (folder / "out.safetensors").read_bytes()
    fewbits.quantize("in.safetensors", "int8", output="expected.safetensors")
    assert written == (folder / "expected.safetensors").read_bytes()


# In this process, with streams that have a descriptor of their own.


def end_of(arguments, stream, monkeypatch):
    """The exit code of a command whose standard output is a stream, after the stream was closed as at Python's end."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["fewbits", *arguments])
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end:
            main()
    if stream is not None:
        stream.close()
    return end.value.code


def full():
    return open("/dev/full", "w")


def not_read():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


COMMANDS = [["--help"], ["--version"], ["inspect", "-h"], ["inspect", "out.safetensors"], VERIFY, [*VERIFY, "--json"]]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_reports_a_full_standard_output_in_one_line(quantized, monkeypatch, capsys, arguments):
    assert end_of(arguments, full(), monkeypatch) == 2
    said = capsys.readouterr().err.splitlines()
    if "--json" in arguments:
        assert json.loads(said[-1]) == {"event": "error", "type": "OSError", "message": FULL + DONE, "code": 2}
    else:
        assert said == [f"fewbits: {FULL}{DONE}"]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_ends_quietly_without_a_reader(quantized, monkeypatch, capsys, arguments):
    assert end_of(arguments, not_read(), monkeypatch) == 141
    assert [line for line in capsys.readouterr().err.splitlines() if '"error"' in line or "fewbits:" in line] == []


@pytest.mark.parametrize("unwritable", [not_read, full])
def test_a_failed_verification_keeps_its_exit_code_if_it_cannot_be_printed(quantized, monkeypatch, capsys, unwritable):
    save_file({"weight": torch.ones(40, 64)}, "in.safetensors")
    assert end_of(VERIFY, unwritable(), monkeypatch) == 1
    assert DONE not in capsys.readouterr().err


def test_standard_output_may_be_missing(quantized, monkeypatch, capsys):
    assert end_of(VERIFY, None, monkeypatch) == 2
    assert capsys.readouterr().err == f"fewbits: standard output cannot be written: Bad file descriptor{DONE}\n"


def test_text_after_an_error_is_dropped_and_the_first_error_is_kept():
    with open("/dev/full", "w") as stream:
        stdout = Stdout(stream)
        assert stdout.write("one") == 3
        stdout.flush()
        first = stdout.error
        assert stdout.write("another") == 7
        stdout.flush()
        assert (stdout.error, stdout.encoding, stdout.isatty()) == (first, stream.encoding, False)
