"""`fewbits completion`: the scripts, and what they offer."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from fewbits.cli.commands import cli
from fewbits.cli.commands import run as run_cli
from fewbits.cli.completing import COMPLETE_VARIABLE, PROGRAM
from fewbits.formats.registry import EXPORTERS
from fewbits.rounding import ROUNDINGS
from fewbits.schemes import SCHEMES


def offered(*words):
    """What is offered for the last word, as (type, value)."""
    *before, last = words
    found = ShellComplete(cli, {}, PROGRAM, COMPLETE_VARIABLE).get_completions(before, last)
    return [(item.type, item.value) for item in found]


@pytest.fixture
def printed(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *arguments])
        code = run_cli()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("quantize", "--scheme", ""), list(SCHEMES)),
        (("quantize", "--scheme", "nf"), ["nf4"]),
        (("quantize", "in", "--rounding", ""), list(ROUNDINGS)),
        (("quantize", "--format", ""), list(EXPORTERS)),
        (("convert", "--format", "g"), ["gguf"]),
        (("quantize", "--embeddings", "ke"), ["keep"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("veri",), ["verify"]),
        (
            (
                "convert",
                "--templ",
            ),
            ["--template"],
        ),
    ],
)
def test_names_are_offered(words, values):
    assert offered(*words) == [("plain", value) for value in values]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("quantize", "mod"), "file"),
        (("quantize", "in", "-o", "o"), "file"),
        (("quantize", "in", "--config", ""), "file"),
        (("quantize", "in", "--calibrate", ""), "file"),
        (("quantize", "in", "--spill", ""), "dir"),
        (("verify", "out", "--against", ""), "file"),
        (("convert", "in", "--template", ""), "file"),
        (("inspect", ""), "file"),
    ],
)
def test_files_are_left_to_the_shell(words, kind):
    assert offered(*words) == [(kind, words[-1])]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_the_program_and_the_variable(printed, shell):
    code, out, err = printed("completion", shell)
    assert (code, err) == (0, "")
    assert f"{COMPLETE_VARIABLE}={shell}_complete" in out
    code, document, _ = printed("completion", shell, "--json")
    assert json.loads(document) == {"shell": shell, "script": out.removesuffix("\n")}


def test_another_shell_is_refused_with_those_there_are(printed):
    code, out, err = printed("completion", "tcsh")
    assert (code, out) == (2, "")
    assert "'bash', 'zsh', 'fish'" in err


@pytest.fixture
def environment(tmp_path):
    """A program `fewbits` in front of the path."""
    program = tmp_path / "bin" / "fewbits"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fewbits "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_program_answers_a_shell(environment):
    words = {"COMP_WORDS": "fewbits quantize --rounding q", "COMP_CWORD": "3", COMPLETE_VARIABLE: "bash_complete"}
    done = subprocess.run(["fewbits"], env=environment | words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,qronos\n", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(environment, printed, tmp_path):
    script = printed("completion", "bash")[1]
    ask = """
        COMP_WORDS=(fewbits quantize --scheme in)
        COMP_CWORD=3
        _fewbits_completion fewbits
        printf '%s ' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script + ask], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [name for name in SCHEMES if name.startswith("in")]
