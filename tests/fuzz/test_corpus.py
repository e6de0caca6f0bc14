"""Replay the fuzzer's corpus: hostile files, and the valid files that they were made from."""

import functools
from collections import Counter
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from case import Case, Item, parse
from hostile import hostile
from mutate import crossed, mutated
from reached import Reached, lines_to_reach
from seeds import seeds
from support.lifecycle_helpers import FEWER_EXAMPLES
from targets import FindingError, limited, nothing_left, run

CORPUS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "corpus").iterdir())}
LIMIT = 1 << 15


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """The outcome of every input, and the lines of the reading code that all inputs together reached."""
    reached, folder = Reached(), tmp_path_factory.mktemp("corpus")
    with limited(), reached.watching():
        outcomes = {name: outcome(data, folder) for name, data in CORPUS.items()}
    return outcomes, reached.lines


def outcome(data, folder):
    try:
        return run(parse(data), folder)
    except Exception as error:
        return error


def test_every_input_ends_in_a_fewbits_error_or_a_sound_result(replayed):
    assert {name: found for name, found in replayed[0].items() if not isinstance(found, str)} == {}


def test_the_corpus_covers_many_outcomes_and_most_are_errors(replayed):
    counts = Counter(replayed[0].values())
    assert {"ok", "CheckpointError", "FormatError", "DigestError", "SourceError", "NonFiniteError"} <= counts.keys()
    assert counts["ok"] < len(CORPUS) / 2


def test_the_corpus_reaches_most_lines_of_the_code_that_reads_files(replayed):
    due = lines_to_reach()
    missed = sorted(f"{Path(file).name}:{line}" for file, line in due - replayed[1])
    assert len(missed) <= 0.1 * len(due), f"{len(missed)} of {len(due)} lines are missed: {', '.join(missed)}"


def test_the_corpus_is_small():
    assert len(CORPUS) <= 300
    assert sum(map(len, CORPUS.values())) < 1_000_000


# How the fuzzer mutates the corpus.

valid = functools.cache(seeds)
forbidden = functools.cache(hostile)


def any_case():
    """Any case in the corpus."""
    return st.sampled_from(sorted(CORPUS)).map(lambda name: parse(CORPUS[name]))


def test_seeds_and_hostile_cases_survive_encoding_and_decoding():
    for case in (valid() | forbidden()).values():
        assert parse(case.to_bytes()) == case


def test_valid_cases_are_quantized_or_loaded_and_hostile_cases_are_refused(tmp_path):
    ends = {name: run(case, tmp_path) for name, case in (valid() | forbidden()).items()}
    assert {name for name in valid() if ends[name] != "ok"} == {"torch-old", "torch-training"}
    assert {name for name in forbidden() if ends[name] == "ok"} == {"tensor-of-a-late-dtype", "tensor-with-a-note"}


@FEWER_EXAMPLES
@given(any_case(), any_case(), st.integers(0, 2**32 - 1))
def test_mutations_depend_on_the_seed_alone_and_give_valid_cases(case, other, seed):
    data = case.to_bytes()
    for made in (lambda: mutated(data, seed, LIMIT), lambda: crossed(data, other.to_bytes(), seed, LIMIT)):
        assert made() == made()
        assert parse(made()) is not None
        assert len(made()) <= LIMIT


OUTSIDE = ["../out", "/tmp/out", "a/../../out", ".", "..", "a//b", "", "a/b/c/d/e"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_case_writes_outside_of_its_directory(name):
    assert parse(Case("load", "int8", "a", (Item("file", name, b"x"),)).to_bytes()) is None
    assert name == "." or parse(Case("load", "int8", name, ()).to_bytes()) is None


@given(st.binary(max_size=100), any_case(), st.integers(0, 500))
def test_bytes_that_are_not_a_case_parse_to_none(data, case, at):
    whole = case.to_bytes()
    for made in (data, whole[:at], whole + data):
        found = parse(made)
        assert found is None or parse(found.to_bytes()) == found


# The fuzzer detects broken code.


def flip(case):
    """Flip a bit in the last byte of the payload."""
    item = case.items[0]
    return attrs.evolve(case, items=(attrs.evolve(item, data=item.data[:-1] + bytes([item.data[-1] ^ 1])),))


def test_a_digest_that_is_not_compared_is_a_finding(tmp_path, monkeypatch):
    case = flip(valid()["ours-int8-channel"])
    assert run(case, tmp_path) == "DigestError"
    monkeypatch.setattr("fewbits.checkpoint.reading.refuse_damaged", lambda names, where: None)
    with pytest.raises(FindingError):
        run(case, tmp_path)


def test_an_error_outside_the_fewbits_hierarchy_is_a_finding(tmp_path, monkeypatch):
    def raising(*_):
        raise KeyError("a")

    monkeypatch.setattr("fewbits.sources.file.FileSource._stated_blocks", raising)
    with pytest.raises(KeyError):
        run(valid()["folder"], tmp_path)


def test_a_file_left_beside_the_output_is_a_finding(tmp_path, monkeypatch):
    def refusing(path, *_):
        (path.parent.parent / "left").touch()
        raise fewbits.errors.FormatError("no")

    case = valid()["safetensors"]
    monkeypatch.setattr("fewbits.checkpoint.safetensors.read_header", lambda file, path: refusing(path))
    with pytest.raises(FindingError, match="left"):
        run(case, tmp_path)


def test_a_source_that_has_changed_is_a_finding(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FindingError, match="another source"):
        nothing_left(tmp_path, {"a": "something else"})
