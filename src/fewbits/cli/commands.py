"""The command ``fewbits``: its commands, its exit codes, and its errors."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import nullcontext, redirect_stdout

import click
from click.shell_completion import shell_complete

from fewbits._version import __version__
from fewbits.cli.allocating import allocate_command
from fewbits.cli.checking import inspect_command, verify_command
from fewbits.cli.completing import COMPLETE_VARIABLE, PROGRAM, completion_command
from fewbits.cli.converting import convert_command
from fewbits.cli.help import Group
from fewbits.cli.quantizing import quantize_command
from fewbits.cli.ranks import own_rank
from fewbits.cli.reporting import report_command
from fewbits.cli.streams import Stderr, Stdout, is_json_asked_for, warnings_as_events
from fewbits.errors import DigestError, FewbitsError

#: Exit codes besides 0. Shells give the last one, 128 and the number of SIGPIPE, to a process without a reader.
FAILED, BAD_USAGE, NOT_READ = 1, 2, 141


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=(
        ("plan a run, and write nothing", "fewbits quantize model.safetensors --scheme int8 --dry-run"),
        ("write a smaller copy, and check it", "fewbits quantize model.safetensors -o small.safetensors --scheme int8"),
        ("show a result", "fewbits inspect small.safetensors"),
        ("check it again", "fewbits verify small.safetensors --against model.safetensors"),
        ("show the help of a command", "fewbits quantize --help"),
    ),
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Make PyTorch checkpoints smaller, and check every written number.

    Exit codes: 0 for success, 1 if verification failed, 2 if the command could not run, 141 if the reader of its output
    went away.
    """


cli.add_command(quantize_command, "quantize")
cli.add_command(allocate_command, "allocate")
cli.add_command(inspect_command, "inspect")
cli.add_command(verify_command, "verify")
cli.add_command(report_command, "report")
cli.add_command(convert_command, "convert")
cli.add_command(completion_command, "completion")


def run() -> int:
    """Run the command line, and print an error of fewbits as one paragraph without a traceback.

    Returns:
        the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # some names of tensors and files cannot be encoded
            stream.reconfigure(errors="backslashreplace")
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        return shell_complete(cli, {}, PROGRAM, COMPLETE_VARIABLE, instruction)  # it writes bytes to standard output
    stdout, stderr, as_json = Stdout(sys.stdout), Stderr(own_rank()), is_json_asked_for(sys.argv[1:])
    with warnings_as_events(stderr) if as_json else nullcontext(), redirect_stdout(stdout):
        try:
            code: int = cli(prog_name=PROGRAM, standalone_mode=False)
        except (click.exceptions.Abort, click.ClickException, FewbitsError) as error:
            code = FAILED if isinstance(error, DigestError) else BAD_USAGE
            stderr.complain(error, code, as_json=as_json)
        stdout.flush()
        return code if stdout.error is None else _unwritten(stdout.error, code, stderr, as_json)


def _unwritten(error: OSError, code: int, stderr: Stderr, as_json: bool) -> int:
    """Return the exit code of a command that could not print its result: its own code, unless that is success."""
    if error.errno == errno.EPIPE:
        return code or NOT_READ
    done = "" if code else "; everything else succeeded"
    code = code or BAD_USAGE
    failure = OSError(f"standard output cannot be written: {error.strerror or error}{done}")
    stderr.complain(failure, code, as_json=as_json)
    return code
