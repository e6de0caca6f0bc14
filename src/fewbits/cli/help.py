"""Help texts: examples on lines of their own, and options under headings."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from click.formatting import HelpFormatter

#: A comment, and the command that it explains.
Example = tuple[str, str]

#: The most characters of the options' column that is common to all headings.
_WIDEST = 26


class Option(click.Option):
    """An option that stands under a heading, in commands that have headings.

    Args:
        heading: the heading; None for the last one of the command.
    """

    def __init__(self, *arguments: Any, heading: str | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.heading = heading


def options_under(heading: str | None) -> Callable[..., Callable[..., Any]]:
    """Return a `click.option` for options that stand under a heading."""
    return functools.partial(click.option, cls=Option, heading=heading)


class Command(click.Command):
    """A command whose help has examples, and options under headings.

    Args:
        arguments: those of `click.Command`.
        examples: comments and commands, printed in front of the options.
        headings: headings of options, in this order; without them all options stand under "Options".
        settings: those of `click.Command`.
    """

    def __init__(
        self, *arguments: Any, examples: Sequence[Example] = (), headings: Sequence[str] = (), **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.examples, self._headings = examples, headings or ("Options",)

    def format_help_text(self, ctx: click.Context, formatter: HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        _write_examples(formatter, self.examples)

    def format_options(self, ctx: click.Context, formatter: HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in self._headings}
        for parameter in self.get_params(ctx):
            # Some versions of click have rows for arguments too, without a text.
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)) is not None:
                heading = getattr(parameter, "heading", None)
                rows[heading if heading in rows else self._headings[-1]].append(row)
        width = min(_WIDEST, max(len(name) for several in rows.values() for name, _ in several))
        for heading, several in rows.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in several])


class Group(click.Group):
    """A group of commands whose help has examples.

    Args:
        arguments: those of `click.Group`.
        examples: comments and commands, printed in front of the options.
        settings: those of `click.Group`.
    """

    def __init__(self, *arguments: Any, examples: Sequence[Example] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = examples

    def format_help_text(self, ctx: click.Context, formatter: HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        _write_examples(formatter, self.examples)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise click.Abort(*stop.args) from None  # click would write an empty line between the events


def one_of(sentence: str, names: Iterable[str]) -> str:
    """End a sentence with the names that an option takes."""
    return f"{sentence}: {', '.join(names)}."


def _write_examples(formatter: HelpFormatter, examples: Sequence[Example]) -> None:
    with formatter.section("Examples"):
        indent = " " * formatter.current_indent
        room = formatter.width - len(indent)
        for comment, command in examples:
            lines = textwrap.wrap(f"# {comment}", room, subsequent_indent="# ")
            options = re.sub(r" (?!-)", "\N{NO-BREAK SPACE}", command)  # an option and its value stay together
            parts = textwrap.wrap(options, room - 4, break_long_words=False, break_on_hyphens=False)
            lines += " \\\n  ".join(parts).replace("\N{NO-BREAK SPACE}", " ").splitlines()
            formatter.write("".join(f"{indent}{line}\n" for line in lines))
