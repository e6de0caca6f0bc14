"""Names and sentences fitted into a width."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits._table import ELLIPSIS, elide, elide_all, elide_first, render_table, wrap, wrap_last

parts = st.text("abc_01[]é漢 -", min_size=1, max_size=25)
dotted = st.lists(parts, min_size=1, max_size=8).map(".".join)


@given(dotted, st.integers(0, 120))
def test_a_name_is_cut_at_dots_and_keeps_its_end(name, width):
    short = elide(name, width)
    assert len(short) <= width
    if len(name) <= width:
        assert short == name
    elif len(ELLIPSIS + name.split(".")[-1]) <= width and "." in name:
        head, tail = short.split(ELLIPSIS)
        assert name.endswith("." + tail)
        assert not head or name.startswith(head + ".")


@given(dotted, st.integers(4, 60))
def test_only_a_last_part_that_is_too_long_is_cut_and_its_end_is_shown(name, width):
    last = name.split(".")[-1]
    if len(name) > width and len(last) + len(ELLIPSIS) > width:
        assert elide(name, width) == ELLIPSIS + name[3 - width :]


def in_a_transformer(layers):
    for i in range(layers):
        for block in ("attention.self.query", "attention.self.key", "attention.output.dense", "output.dense"):
            yield f"encoder.layer.{i}.{block}.weight"
            yield f"encoder.layer.{i}.{block}.bias"


@pytest.mark.parametrize("width", [36, 38, 41, 80])
def test_names_that_differ_stay_different(width):
    names = list(in_a_transformer(12))
    short = elide_all(names, width)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= width


@given(st.lists(dotted, max_size=8), st.integers(0, 60))
def test_shortened_names_fit_and_short_names_are_unchanged(names, width):
    short = elide_all(names, width)
    assert all(len(text) <= width for text in short)
    assert all(text == name for name, text in zip(names, short, strict=True) if len(name) <= width)


@given(st.text(), st.integers(20, 100))
def test_a_sentence_is_broken_between_words(text, width):
    lines = wrap(text, width, "  ")
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
    if all(len(word) <= width - 2 for word in text.split()):
        assert " ".join(lines).split() == text.split()


sentences = st.lists(st.text("abc", min_size=1, max_size=20), max_size=30).map(" ".join)
rows = st.lists(st.tuples(dotted, st.text("xyz", max_size=12), sentences), min_size=1, max_size=6)


@given(rows, st.integers(50, 120))
def test_a_table_with_shortened_names_fits_the_width(table, width):
    names_and_figures = [row[:2] for row in table]
    assert max(map(len, render_table(elide_first(names_and_figures, width)).splitlines())) <= width


@given(rows, st.integers(80, 120))
def test_a_table_with_wrapped_text_fits_the_width(table, width):
    figures_and_text = [row[1:] for row in table]
    wrapped = wrap_last(figures_and_text, width)
    assert max(map(len, render_table(wrapped).splitlines())) <= width
    assert [row[0] for row in wrapped if row[0]] == [row[0] for row in figures_and_text if row[0]]
    assert " ".join(row[1] for row in wrapped).split() == " ".join(row[1] for row in figures_and_text).split()
