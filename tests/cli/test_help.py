"""Help texts: examples that can be run, headings, one vocabulary for all commands, widths."""

import itertools
import re
import shlex

import click
import pytest

from fewbits.cli.commands import cli
from fewbits.cli.help import Command
from fewbits.cli.options import HEADINGS

COMMANDS = {"fewbits": cli, **{f"fewbits {name}": command for name, command in cli.commands.items()}}


def context(name):
    parent = click.Context(cli, info_name="fewbits", **cli.context_settings)
    return parent if name == "fewbits" else click.Context(COMMANDS[name], info_name=name.split()[1], parent=parent)


def help_of(name):
    return COMMANDS[name].get_help(context(name))


def options_of(name):
    return [parameter for parameter in COMMANDS[name].get_params(context(name)) if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal_and_80_columns(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of(name).splitlines()
    assert max(map(len, lines)) <= min(columns, 80)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_on_lines_of_their_own(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(name)
    assert "\\b" not in text
    assert "\b" not in text
    lines = [line.strip() for line in text.splitlines()]
    for comment, command in COMMANDS[name].examples:
        assert f"# {comment}" in lines
        assert any(line and command.startswith(line.removesuffix(" \\")) for line in lines)
    assert any(line.startswith("fewbits ") for line in lines)


def test_a_long_example_continues_after_a_backslash_and_keeps_an_option_with_its_value(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    example = "fewbits made --first one --second two --third three --fourth four --fifth five"
    made = Command("made", examples=[("why", example)])
    printed = made.get_help(click.Context(made)).partition("# why\n")[2].partition("\n\n")[0]
    assert len(printed.splitlines()) > 1
    assert shlex.split(printed.replace("\\\n", " ")) == shlex.split(example)
    assert all(line.strip().startswith("--") for line in printed.splitlines()[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_has_only_commands_and_options_that_exist(name):
    for _, command in COMMANDS[name].examples:
        words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", command).partition("|")[0])
        assert words[0] == "fewbits"
        group, rest = words[1], words[2:]
        if "--help" not in rest:
            cli.commands[group].make_context(group, rest, parent=context("fewbits"))


def test_every_option_of_quantize_stands_under_one_of_five_headings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of("fewbits quantize").partition("\nWhat to quantize:\n")
    headings = re.findall(r"^(\w[\w ]+):$", text[1] + text[2], re.MULTILINE)
    assert tuple(headings) == HEADINGS
    shown = re.findall(r"^  (-\S+)", text[2], re.MULTILINE)
    records = [option.get_help_record(context("fewbits quantize")) for option in options_of("fewbits quantize")]
    assert sorted(shown) == sorted(names.split()[0] for names, _ in records)
    last = text[2].partition("\nRunning:\n")[2]
    assert "--json" in last
    assert "--help" in last
    assert "--output" not in last


def test_every_command_has_json():
    for name in cli.commands:
        assert "--json" in [flag for option in options_of(f"fewbits {name}") for flag in option.opts], name


def test_an_option_has_the_same_name_for_values_and_the_same_first_sentence_in_every_command():
    known = {}
    for name, option in itertools.chain.from_iterable(((n, o) for o in options_of(n)) for n in COMMANDS):
        flag = max(option.opts, key=len)
        said = (option.metavar, option.is_flag, option.help.partition(". ")[0].rstrip("."))
        assert known.setdefault(flag, (name, said))[1] == said, f"{flag} of {name} and of {known[flag][0]}"


def test_every_option_says_its_values_and_its_effect():
    for name in cli.commands:
        for option in options_of(f"fewbits {name}"):
            assert option.help.endswith("."), (name, option.opts)
            assert option.is_flag or option.metavar, (name, option.opts)
