"""The progress of a run: a bar on a terminal, lines elsewhere, events with --json."""

import fcntl
import itertools
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import warnings

import pytest
import safetensors.torch
import torch
from rich.cells import cell_len

import fewbits
from fewbits.cli.commands import run as run_cli
from fewbits.cli.progress import shown_progress
from fewbits.selection.progress import Step

if sys.platform != "linux":
    pytest.skip("opens pseudo-terminals", allow_module_level=True)

QUANTIZE = ["quantize", "in", "-o", "out", "--scheme", "int8"]
TENSORS = 20
LONG = "model." + "very_" * 40 + "long.weight"


def write(path, names):
    tensors = {name: torch.linspace(-1, 1, 1024).reshape(16, 64) + i for i, name in enumerate(names)}
    safetensors.torch.save_file(tensors, path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a float checkpoint `in` of some tensors of one size."""
    monkeypatch.chdir(tmp_path)
    write("in", [f"layers.{i}.weight" for i in range(TENSORS)])
    return tmp_path


@pytest.fixture
def called(folder, monkeypatch):
    """Run the command line with a clock that moves `tick` seconds per step; return the exit code."""

    def call(*arguments, tick=0.0):
        ticks = itertools.count(0, tick)
        monkeypatch.setattr("fewbits.cli.progress.monotonic", lambda: next(ticks))
        monkeypatch.setattr(sys, "argv", ["fewbits", *arguments])
        return run_cli()

    return call


@pytest.fixture
def piped(called, capsys):
    """Run the command line; return exit code, standard output and standard error."""
    return lambda *arguments, tick=0.0: (called(*arguments, tick=tick), *capsys.readouterr())


def events(lines, kind="progress"):
    """The events of one kind; every line is one."""
    found = [json.loads(line) for line in lines.splitlines()]
    return [event for event in found if event["event"] == kind]


# Neither a terminal nor --json.


def test_a_short_run_prints_no_lines(piped):
    code, _, err = piped(*QUANTIZE, tick=1 / 32)
    assert (code, err) == (0, "")


def test_a_long_run_prints_a_line_now_and_then_and_at_the_end_of_each_activity(piped):
    _, out, err = piped(*QUANTIZE, tick=1)
    lines = err.splitlines()
    # Two steps a tensor. Lines come 3 seconds into an activity, every 10 seconds from then on, and at its end.
    for activity, found in (("convert", lines[:5]), ("validate", lines[5:])):
        assert [int(re.match(rf"fewbits: {activity} (\d+) %, ", line)[1]) for line in found] == [10, 35, 60, 85, 100]
        assert all(
            re.fullmatch(r".* %, [\d.]+ of 81.9 kB, [\d.]+ kB/s, \d+ s left, layers\.\d+\.weight", line)
            for line in found[:-1]
        )
        assert found[-1].startswith(f"fewbits: {activity} 100 %, 81.9 of 81.9 kB, ")
    assert "\x1b" not in err
    assert "fewbits: " not in out


def test_forced_colours_do_not_make_a_pipe_a_terminal(piped, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert piped(*QUANTIZE)[2] == ""


def test_names_cannot_break_a_line(piped):
    write("in", ["a\nfewbits: convert 100 %, \x1b[2J", LONG])
    lines = piped(*QUANTIZE, tick=4)[2].splitlines()
    assert all(line.isprintable() and len(line) < 200 for line in lines)
    assert all(line.startswith(("fewbits: convert ", "fewbits: validate ")) for line in lines)


@pytest.mark.parametrize("quiet", ["-q", "--quiet"])
def test_quiet_silences_progress_but_not_results_and_errors(piped, quiet):
    code, out, err = piped(*QUANTIZE, quiet, tick=10)
    assert (code, err) == (0, "")
    assert "written: out" in out
    assert piped("verify", "out", "--against", "in", quiet, tick=10)[2] == ""
    code, _, err = piped(*QUANTIZE, quiet)
    assert code == 2
    assert err.startswith("fewbits: out exists")


# Events.


def test_events_are_lines_of_json_beside_the_document(piped):
    _, out, err = piped(*QUANTIZE, "--json", tick=1 / 8)
    assert json.loads(out)["report"]["ok"]
    told = events(err)
    assert len(told) == len(err.splitlines()) == 22
    total = TENSORS * 16 * 64 * 4
    for activity, found in (("convert", told[:11]), ("validate", told[11:])):
        assert {event["activity"] for event in found} == {activity}
        assert {event["total"] for event in found} == {total}
        assert {event["unit"] for event in found} == {"bytes"}
        # Eight steps a second are too many to tell; two a second, the first, and the last.
        assert [event["done"] for event in found] == [*range(0, total, total // 10), total]
        assert [event["tensor"] for event in found[:-1]] == sorted(f"layers.{i}.weight" for i in range(TENSORS))[::2]
        assert (found[0]["bytes_per_second"], found[0]["seconds_left"]) == (None, None)
        assert all(event["bytes_per_second"] > 0 and event["seconds_left"] > 0 for event in found[1:-1])
        assert found[-1]["seconds_left"] == 0


@pytest.mark.parametrize("name", ["a\nb\x1b[2J\u202e", "漢字", LONG])
def test_events_have_the_original_names(piped, name):
    write("in", [name])
    assert {event["tensor"] for event in events(piped(*QUANTIZE, "--json")[2])} == {name}


def test_quiet_leaves_the_document_and_the_errors(piped):
    _, out, err = piped(*QUANTIZE, "--json", "-q")
    assert (err, json.loads(out)["output"]) == ("", "out")
    (error,) = events(piped(*QUANTIZE, "--json", "-q")[2], "error")
    assert error["type"] == "ArgumentError"


@pytest.mark.parametrize(
    ("arguments", "kind", "message", "code"),
    [
        (["inspect", "missing", "--json"], "CheckpointError", "missing does not exist", 2),
        (["verify", "broken", "--json"], "DigestError", "header", 1),
        (["inspect", "--json"], "MissingParameter", "Missing argument 'FILE'", 2),
        (["inspect", "in", "--json", "--no-such"], "NoSuchOption", "--no-such", 2),
        (["quantize", "in", "--json"], "UsageError", "Missing option '-o'", 2),
        (["--json"], "NoSuchOption", "--json", 2),
    ],
)
def test_errors_are_events_too(piped, folder, arguments, kind, message, code):
    fewbits.quantize("in", "int8", output="broken")
    data = (folder / "broken").read_bytes()
    (folder / "broken").write_bytes(data.replace(b"int8 channel", b"int9 channel", 1))
    found, out, err = piped(*arguments)
    (error,) = events(err, "error")
    assert (found, out) == (code, "")
    assert (error["type"], error["code"]) == (kind, code)
    assert message in error["message"]


def test_a_file_may_be_called_json(piped):
    os.rename("in", "--json")
    assert piped("inspect", "--", "--json")[2].startswith("fewbits: --json was not written by fewbits")


def test_an_interruption_is_an_event(piped, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    code, out, err = piped(*QUANTIZE, "--json")
    assert (code, out) == (2, "")
    assert events(err, "error") == [{"event": "error", "type": "Abort", "message": "interrupted", "code": 2}]


@pytest.mark.filterwarnings("always::UserWarning")
def test_warnings_are_events_and_the_handlers_of_python_are_restored(piped, monkeypatch):
    def warn(file):
        warnings.warn("mind\nthe gap", stacklevel=1)
        logging.getLogger("some").warning("and the %s", "step")
        return fewbits.load(file)

    monkeypatch.setattr("fewbits.cli.checking.open_quantized", warn)
    before = logging.getLogger().handlers[:], warnings.showwarning
    code, _, err = piped("inspect", "in", "--json")
    assert (logging.getLogger().handlers, warnings.showwarning) == before
    python, logged = events(err, "warning")
    assert (code, python["source"], len(events(err, "error"))) == (2, "py.warnings", 1)
    assert "mind\nthe gap" in python["message"]
    assert logged == {"event": "warning", "source": "some", "message": "and the step"}


# A terminal.


def read_all(master):
    """Read a terminal until its other end is closed."""
    drawn = b""
    try:
        while piece := os.read(master, 65536):
            drawn += piece
    except OSError:  # Linux says EIO once the other end is closed and everything is read
        pass
    os.close(master)
    return drawn.decode()


@pytest.fixture
def on_terminal(called, monkeypatch):
    """Run the command line with standard error on a terminal; return exit code and drawing."""

    def call(*arguments, width=80, term="xterm", tick=0.0):
        master, slave = pty.openpty()
        drawn = []
        reader = threading.Thread(target=lambda: drawn.append(read_all(master)))
        reader.start()
        with monkeypatch.context() as patch, open(slave, "w") as terminal:
            patch.setenv("COLUMNS", str(width))
            patch.setenv("TERM", term)
            patch.setattr(sys, "stderr", terminal)
            code = called(*arguments, tick=tick)
        reader.join()
        return code, drawn[0]

    return call


def lines_in(drawn):
    """The lines that were drawn over each other."""
    return [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", drawn)) if line]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_on_a_terminal_there_is_a_bar_on_one_line_that_vanishes(on_terminal, width):
    write("in", ["[bold]\x1b]0;title\x07\n.weight", "漢" * 100, LONG])
    code, drawn = on_terminal(*QUANTIZE, width=width)
    lines = lines_in(drawn)
    assert code == 0
    assert lines[0].startswith("convert   0 %")
    assert lines[-1].startswith("validate 100 %")
    assert all(cell_len(line) <= width for line in lines)
    assert drawn.count("\n") == 1  # after which the cursor moves up again
    assert drawn.endswith("\x1b[1A\x1b[2K")
    assert "\x07" not in drawn
    assert "\x1b]" not in drawn
    assert ("━" in lines[-1]) == (width >= 80)


def test_the_bar_has_bytes_rate_and_the_tensor(on_terminal):
    last = lines_in(on_terminal(*QUANTIZE, width=100, tick=1)[1])[-1]
    assert re.fullmatch(r"validate 100 %  ━{10}  81\.9 of 81\.9 kB  2\.\d kB/s  layers\.\d+\.weight", last)


def test_markup_in_a_name_is_only_text(on_terminal):
    write("in", ["[bold]a[/].weight"])
    assert "[bold]a[/].weight" in on_terminal(*QUANTIZE, width=120)[1]


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(on_terminal):
    drawn = on_terminal(*QUANTIZE, term="dumb", tick=4)[1]
    assert drawn.startswith("fewbits: convert ")
    assert "\x1b" not in drawn


def test_with_json_a_terminal_gets_events_too(on_terminal):
    code, drawn = on_terminal(*QUANTIZE, "--json")
    assert code == 0
    assert events(drawn)[-1]["done"] == events(drawn)[-1]["total"]


def test_a_command_that_fails_early_draws_nothing(on_terminal):
    code, drawn = on_terminal("verify", "missing")
    assert code == 2
    assert drawn.startswith("fewbits: missing does not exist")
    assert "\x1b" not in drawn


# Processes of their own.


def started(*arguments, stderr, environment=None):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | (environment or {})
    command = [sys.executable, "-m", "fewbits", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr}
    return subprocess.Popen(command, text=True, env=environment, **streams)


def test_the_bar_has_the_width_of_the_terminal(folder):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with started(*QUANTIZE, stderr=slave, environment={"TERM": "xterm"}) as process:
        os.close(slave)
        drawn = read_all(master)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "written: out" in out
    assert lines_in(drawn)[0] == "convert   0 %  ────────  0.0 of 81.9 kB"
    assert max(map(len, lines_in(drawn))) <= 40


def test_a_terminal_that_is_closed_stops_no_conversion(folder):
    master, slave = pty.openpty()
    with started(*QUANTIZE, stderr=slave, environment={"TERM": "xterm"}) as process:
        os.close(slave)
        os.read(master, 1)
        os.close(master)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "written: out" in out


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full_disk():
    return open("/dev/full", "w")


@pytest.mark.parametrize(
    ("unwritable", "arguments", "code"),
    [
        (broken_pipe, [*QUANTIZE, "--json"], 0),
        pytest.param(full_disk, [*QUANTIZE, "--json"], 0, marks=pytest.mark.slow),
        (broken_pipe, ["inspect", "missing"], 2),
        pytest.param(broken_pipe, ["inspect"], 2, marks=pytest.mark.slow),
    ],
)
def test_a_failing_standard_error_changes_no_exit_code(folder, unwritable, arguments, code):
    with unwritable() as stderr, started(*arguments, stderr=stderr) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert code or json.loads(out)["report"]["ok"]


def test_standard_error_may_be_missing(called, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert called(*QUANTIZE, tick=1) == 0
        assert called(*QUANTIZE) == called("inspect") == 2
    assert "written: out" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
def test_standard_error_may_be_closed_during_a_run(monkeypatch, as_json):
    ticks = itertools.count(0, 4)
    monkeypatch.setattr("fewbits.cli.progress.monotonic", lambda: next(ticks))
    with open(os.devnull, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with shown_progress(as_json=as_json, quiet=False) as progress:
            stream.close()
            for done in range(3):
                progress(Step("convert", "t", done, 2))


def run_that_fails(**options):
    with shown_progress(**options) as progress:
        progress(Step("convert", "t", 0, 1))
        raise ZeroDivisionError


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("quiet", [False, True])
def test_an_error_of_the_run_comes_through(as_json, quiet):
    with pytest.raises(ZeroDivisionError):
        run_that_fails(as_json=as_json, quiet=quiet)
