"""`check_serializer`: whether a serializer keeps what `Serializer`, `Writer` and `Reader` promise."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.api import verify
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import CheckpointError, FewbitsError, FormatError
from fewbits.formats.loading import load
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect, fail, for_all
from fewbits.testing.environment import files_in, snapshot, undetected_damage
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.quantizer_setup import folder
from fewbits.testing.serializer_setup import TENSORS, SerializerSetup, entries, put
from fewbits.testing.strategies import tensors

_READ = Contract("fewbits.extend.Reader", "entries: every tensor in it.")
_BITS = Contract("fewbits.testing.check_serializer", "Tensors are read back bit for bit")
_STRINGS = Contract("fewbits.extend.Reader", "metadata: the strings it was sealed with.")
_UNSEEN = Contract("fewbits.extend.Writer", "Nothing is visible at its path before `close`.")
_PUBLISH = Contract("fewbits.extend.Writer.close", "Publish the finished file at its path.")
_ABORT = Contract("fewbits.extend.Writer.abort", "Give up and leave nothing behind. Does nothing after `close`.")
_ONCE = Contract("fewbits.extend.Writer.write", "Write one of the header's tensors; in any order, each once.")
_DIGESTS = Contract("fewbits.verify", "digests, structure, and every element against its source")
_FORMAT = Contract("fewbits.extend.Serializer.reader", "FormatError: if it is not in this serializer's format.")
_OPEN = Contract("fewbits.extend.Serializer.reader", "CheckpointError: if it cannot be opened.")
_BEGIN = Contract("fewbits.extend.Serializer.writer", "CheckpointError: if it cannot be begun.")
_ALIAS = Contract("fewbits.testing.check_serializer", "Writing into a tensor that was read never changes the file.")
_RESULT = Contract("fewbits.extend.Serializer", "Writes and reads the result of a quantization.")

_NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)


def check_serializer(serializer: Serializer, *, suffix: str = ".model", max_examples: int = EXAMPLES) -> list[Check]:
    """The checks of a serializer.

    What is asked beyond the docstrings of `Serializer`, `Writer` and `Reader`:

    - Tensors are read back bit for bit: floating ones of 16 to 64 bits, integers, bools, empty ones and scalars, of any
      strides. Their names and the metadata are any strings that UTF-8 can hold.
    - Writing into a tensor that was read never changes the file.
    - A file with a tensor missing is not finished.

    Args:
        serializer: newly made.
        suffix: how the names of its files end.
        max_examples: how many examples a check that draws them looks at.

    Raises:
        ArgumentError: if it is no instance of `Serializer`.
    """
    setup = SerializerSetup(copy_of(serializer, Serializer, "check_serializer"), suffix, max_examples)
    return checks(serializer, _CHECKS, setup)


def tensors_come_back(setup: SerializerSetup) -> None:
    """Tensors of all dtypes, shapes and strides, under any names, are read back bit for bit."""

    def come_back(stored: dict[str, Tensor]) -> None:
        with folder() as there:
            sealed = setup.write(setup.path(there), stored)
            reader = setup.make().reader(setup.path(there))
            expect(dict(reader.entries) == entries(stored), f"the file has the entries {reader.entries}", _READ)
            for found in (sealed, setup.read(setup.path(there))):
                wrong = sorted(name for name, bits in snapshot(stored).items() if found[name] != bits)
                expect(not wrong, f"read back with other bits: {', '.join(map(repr, wrong))}", _BITS)

    for_all(setup.examples, come_back, st.dictionaries(_NAMES, tensors(), max_size=5))


def metadata_comes_back(setup: SerializerSetup) -> None:
    """Strings survive: of any language, with line ends and quotes, empty and long, and shorter than announced."""
    hard = {"größe": "重み\n\r\t\"'\\\0 \U0001f600", "empty": "", "long": "x" * 300_000, "fewbits.ledger": "[1, 2]"}

    def come_back(strings: dict[str, str]) -> None:
        with folder() as there:
            setup.write(setup.path(there), TENSORS, strings)
            found = dict(setup.make().reader(setup.path(there)).metadata)
            expect(found == strings, f"metadata {_short(strings)} is read back as {_short(found)}", _STRINGS)

    come_back(hard)
    for_all(setup.examples, come_back, st.dictionaries(_NAMES, st.text(st.characters(exclude_categories=["Cs"]))))


def nothing_is_visible_before_close(setup: SerializerSetup) -> None:
    """Until `close` the path is as it was, with a file of before or without; then there is that file alone."""
    with folder() as there:
        path = setup.path(there)
        for before in ({}, {path.name: b"another file"}):
            for name, content in before.items():
                (there / name).write_bytes(content)
            with setup.begin(path, TENSORS) as writer:
                put(writer, TENSORS)
                expect(_at(path) == before.get(path.name), "written, not sealed: the path has changed", _UNSEEN)
                writer.seal({"key": "value"})
                expect(_at(path) == before.get(path.name), "sealed, not closed: the path has changed", _UNSEEN)
                writer.close()
            expect(files_in(there).keys() == {path.name}, f"besides the file: {sorted(files_in(there))}", _PUBLISH)
            expect(setup.read(path) == snapshot(TENSORS), "closed: not what was written", _PUBLISH)


def abort_leaves_nothing(setup: SerializerSetup) -> None:
    """Given up at any point, it leaves the folder as it was; after `close` it leaves the file."""
    for steps in range(3):
        for before in (None, b"another file"):
            with folder() as there:
                path = setup.path(there)
                if before is not None:
                    path.write_bytes(before)
                expected = files_in(there)
                writer = setup.begin(path, TENSORS)
                if steps > 0:
                    put(writer, TENSORS)
                if steps > 1:
                    writer.seal({})
                writer.abort()
                writer.abort()
                expect(files_in(there) == expected, f"given up, it leaves {sorted(files_in(there))}", _ABORT)
    with folder() as there:
        path = setup.path(there)
        with setup.begin(path, TENSORS) as writer:
            put(writer, TENSORS)
            writer.seal({})
            writer.close()
            writer.abort()
        expect(path.is_file(), "abort after close removes the file", _ABORT)


def a_failed_write_leaves_the_old_file(setup: SerializerSetup) -> None:
    """An error on the way leaves the old file; a file with a tensor missing is an error."""
    with folder() as there:
        path = setup.path(there)
        setup.write(path, {"old": torch.ones(3)})
        expected = files_in(there)
        with contextlib.suppress(InterruptedError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            raise InterruptedError
        expect(files_in(there) == expected, "an error on the way changes the folder", _UNSEEN)
        sealed = False
        with contextlib.suppress(FewbitsError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            writer.seal({})
            sealed = True
        expect(not sealed, "a file is sealed that lacks most of its tensors", _ONCE)
        expect(files_in(there) == expected, "an error in seal changes the folder", _UNSEEN)


def damage_is_found(setup: SerializerSetup) -> None:
    """A flipped bit anywhere is found, or changes nothing that is read."""
    with folder() as there:
        path = setup.path(there)
        setup.quantized().save(path)
        missed, found = undetected_damage(path, setup.make())
    expect(not missed, f"bits flipped in bytes {missed} change what is read, and verify finds nothing", _DIGESTS)
    expect(found > 0, "of all flipped bits verify finds none", _DIGESTS)


def what_cannot_be_opened_is_named(setup: SerializerSetup) -> None:
    """Files that are missing, of another format, or cut short, and folders that are missing, are errors of ours."""
    with folder() as there:
        path = setup.path(there)
        _refused(lambda: setup.make().reader(path), CheckpointError, "a missing file", _OPEN)
        setup.write(path, TENSORS)
        half = path.read_bytes()[: path.stat().st_size // 2]
        for what, content in {"an empty file": b"", "text": b"no tensors here", "half a file": half}.items():
            other = there / f"other{setup.suffix}"
            other.write_bytes(content)
            _refused(functools.partial(setup.read, other), FormatError, what, _FORMAT)
        missing = there / "missing" / path.name
        _refused(lambda: setup.write(missing, TENSORS), CheckpointError, "a folder that does not exist", _BEGIN)


def reading_never_changes_a_file(setup: SerializerSetup) -> None:
    """A tensor that was read can be written to, and the file stays."""
    with folder() as there:
        path = setup.path(there)
        setup.write(path, TENSORS)
        before = path.read_bytes()
        setup.make().reader(path).read("layers.0.weight").zero_()
        expect(path.read_bytes() == before, "writing into a tensor that was read changes the file", _ALIAS)
        expect(setup.read(path) == snapshot(TENSORS), "it is read differently afterwards", _ALIAS)


def models_are_saved_and_loaded(setup: SerializerSetup) -> None:
    """It serves `Result.save`, `fewbits.verify` and `fewbits.load`, by strings and by `Path`."""
    result = setup.quantized()
    with folder() as there:
        path = setup.path(there)
        result.save(str(path))
        report = verify(path, SmallModel(), serializer=setup.make())
        expect(report.ok, f"verify found: {'; '.join(report.failures)}", _RESULT)
        loaded = load(path, serializer=setup.make())
        expect(snapshot(loaded) == snapshot(result.model), "fewbits.load gives other bits than were saved", _RESULT)
        model = load(str(path), into=SmallModel(seed=1), serializer=setup.make())
        with torch.no_grad():
            same = torch.equal(model(ids()), result.model(ids()))
        expect(same, "a model that was loaded computes something else", _RESULT)
    expect(report.sqnr_db is not None, "verify measured nothing", _DIGESTS)


def _refused(call: Callable[[], object], expected: type[CheckpointError], what: str, contract: Contract) -> None:
    try:
        call()
    except expected:
        return
    except Exception as error:
        fail(f"{what}: {type(error).__name__} in place of {expected.__name__}: {error}", contract)
    fail(f"{what}: no error", contract)


def _at(path: Path) -> bytes | None:
    """What is at a path; None for nothing."""
    return path.read_bytes() if path.exists() else None


def _short(strings: Mapping[str, str]) -> str:
    return str({key: value if len(value) < 100 else f"{value[:20]!r} and so on" for key, value in strings.items()})


_CHECKS = (
    tensors_come_back,
    metadata_comes_back,
    nothing_is_visible_before_close,
    abort_leaves_nothing,
    a_failed_write_leaves_the_old_file,
    damage_is_found,
    what_cannot_be_opened_is_named,
    reading_never_changes_a_file,
    models_are_saved_and_loaded,
)
