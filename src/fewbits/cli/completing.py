"""``fewbits completion``: the script that completes commands, options and values in a shell."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from fewbits.cli.help import Command
from fewbits.cli.options import json_option
from fewbits.cli.printing import print_json

PROGRAM = "fewbits"
#: The script starts the program with this variable, which names the shell.
COMPLETE_VARIABLE = "_FEWBITS_COMPLETE"

_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command(
    cls=Command,
    short_help="Print a script for completion in a shell.",
    examples=(
        ("bash, from version 4.4: in ~/.bashrc", 'eval "$(fewbits completion bash)"'),
        ("zsh: in ~/.zshrc", 'eval "$(fewbits completion zsh)"'),
        ("fish: in ~/.config/fish/config.fish", "fewbits completion fish | source"),
    ),
)
@click.argument("shell", metavar="SHELL", type=click.Choice(list(_SHELLS)))
@json_option
@click.pass_context
def completion_command(ctx: click.Context, shell: str, as_json: bool) -> int:
    """Print the script that completes commands, options, schemes and files in SHELL: bash, zsh or fish."""
    complete = _SHELLS[shell](ctx.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE)
    # BashComplete.source would run the bash of this machine to ask for its version.
    script = ShellComplete.source(complete)
    if as_json:
        print_json(shell=shell, script=script)
    else:
        click.echo(script)
    return 0
