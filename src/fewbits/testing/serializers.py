"""`check_serializer`: check a serializer against the promises of `Serializer`, `Writer` and `Reader`."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.api import Result, quantize, verify
from fewbits.checkpoint.serializer import Entry, Header, Serializer, Writer
from fewbits.errors import CheckpointError, FewbitsError, FormatError
from fewbits.formats.loading import load
from fewbits.testing.check import EXAMPLES, Check, Contract, checks, copy_of, expect, fail, for_all
from fewbits.testing.environment import Snapshot, check_damage, files_in, folder, snapshot
from fewbits.testing.models import SmallModel, ids
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

#: A tensor of each kind.
TENSORS = {
    "layers.0.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layers.0.bias": torch.tensor([1.5, -2.0, float("nan")], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "mask": torch.tensor([[True, False]]),
    "nothing": torch.empty(0, 5),
}


def check_serializer(serializer: Serializer, *, suffix: str = ".model", max_examples: int = EXAMPLES) -> list[Check]:
    """Make the checks of a serializer.

    Beyond the docstrings of `Serializer`, `Writer` and `Reader`, the checks require:

    - Tensors are read back bit for bit: floats of 16 to 64 bits, integers, bools, empty tensors and scalars, with any
      strides. Names and metadata may be any UTF-8 strings.
    - Writing into a tensor that was read never changes the file.
    - A file with a missing tensor cannot be finished.

    Args:
        serializer: a new serializer.
        suffix: the end of its file names.
        max_examples: number of examples that a check draws.

    Raises:
        ArgumentError: if `serializer` is not an instance of `Serializer`.
    """
    setup = SerializerSetup(copy_of(serializer, Serializer, "check_serializer"), suffix, max_examples)
    return checks(serializer, _CHECKS, setup)


@attrs.frozen
class SerializerSetup:
    """A serializer to check. The checks use copies of `recipe`."""

    recipe: Serializer
    suffix: str
    examples: int

    def make(self) -> Serializer:
        return copy.deepcopy(self.recipe)

    def path(self, there: Path) -> Path:
        return there / f"model{self.suffix}"

    def begin(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Writer:
        """Begin a file, and announce longer metadata than will follow."""
        announced = {key: value + " " * 9 for key, value in (metadata or {"key": "value"}).items()}
        return self.make().writer(path, Header(entries(stored), announced))

    def write(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Snapshot:
        """Write a whole file.

        Returns:
            the tensors as read back before it is closed.
        """
        with self.begin(path, stored, metadata) as writer:
            put(writer, stored)
            reader = writer.seal(metadata or {})
            read = snapshot({name: reader.read(name) for name in reader.entries})
            writer.close()
        return read

    def read(self, path: Path) -> Snapshot:
        reader = self.make().reader(path)
        return snapshot({name: reader.read(name) for name in reader.entries})

    def quantized(self) -> Result:
        return quantize(SmallModel(), "int8", serializer=self.make(), validate=False)


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
    """Strings survive: in any language, with line ends and quotes, empty, long, or shorter than announced."""
    hard = {"größe": "重み\n\r\t\"'\\\0 \U0001f600", "empty": "", "long": "x" * 300_000, "fewbits.ledger": "[1, 2]"}

    def come_back(strings: dict[str, str]) -> None:
        with folder() as there:
            setup.write(setup.path(there), TENSORS, strings)
            found = dict(setup.make().reader(setup.path(there)).metadata)
            expect(found == strings, f"metadata {_short(strings)} is read back as {_short(found)}", _STRINGS)

    come_back(hard)
    for_all(setup.examples, come_back, st.dictionaries(_NAMES, st.text(st.characters(exclude_categories=["Cs"]))))


def nothing_is_visible_before_close(setup: SerializerSetup) -> None:
    """Until `close` the path is unchanged, whether a file was there or not; then it holds the new file only."""
    with folder() as there:
        path = setup.path(there)
        for before in ({}, {path.name: b"another file"}):
            for name, content in before.items():
                (there / name).write_bytes(content)
            with setup.begin(path, TENSORS) as writer:
                put(writer, TENSORS)
                expect(_at(path) == before.get(path.name), "the path has changed before seal", _UNSEEN)
                writer.seal({"key": "value"})
                expect(_at(path) == before.get(path.name), "the path has changed before close", _UNSEEN)
                writer.close()
            expect(
                files_in(there).keys() == {path.name},
                f"other files are left beside the file: {sorted(files_in(there))}",
                _PUBLISH,
            )
            expect(
                setup.read(path) == snapshot(TENSORS), "the closed file has other tensors than were written", _PUBLISH
            )


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
                expect(files_in(there) == expected, f"abort leaves {sorted(files_in(there))}", _ABORT)
    with folder() as there:
        path = setup.path(there)
        with setup.begin(path, TENSORS) as writer:
            put(writer, TENSORS)
            writer.seal({})
            writer.close()
            writer.abort()
        expect(path.is_file(), "abort after close removes the file", _ABORT)


def a_failed_write_leaves_the_old_file(setup: SerializerSetup) -> None:
    """An error while writing leaves the old file; so does a file with a missing tensor, which is an error."""
    with folder() as there:
        path = setup.path(there)
        setup.write(path, {"old": torch.ones(3)})
        expected = files_in(there)
        with contextlib.suppress(InterruptedError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            raise InterruptedError
        expect(files_in(there) == expected, "an error while writing changes the folder", _UNSEEN)
        sealed = False
        with contextlib.suppress(FewbitsError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            writer.seal({})
            sealed = True
        expect(not sealed, "a file without most of its tensors can be sealed", _ONCE)
        expect(files_in(there) == expected, "an error in seal changes the folder", _UNSEEN)


def damage_is_found(setup: SerializerSetup) -> None:
    """`verify` finds a flipped bit anywhere in a file, or the bit does not matter."""
    with folder() as there:
        path = setup.path(there)
        setup.quantized().save(path)
        check_damage(path, setup.make())


def unreadable_files_are_errors(setup: SerializerSetup) -> None:
    """Missing files and folders, other formats, and cut files raise errors of fewbits."""
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
        expect(setup.read(path) == snapshot(TENSORS), "the file reads differently afterwards", _ALIAS)


def models_are_saved_and_loaded(setup: SerializerSetup) -> None:
    """`Result.save`, `fewbits.verify` and `fewbits.load` work with it, by strings and by `Path`."""
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
        expect(same, "the loaded model computes other bits", _RESULT)
    expect(report.sqnr_db is not None, "verify measured nothing", _DIGESTS)


def _refused(call: Callable[[], object], expected: type[CheckpointError], what: str, contract: Contract) -> None:
    try:
        call()
    except expected:
        return
    except Exception as error:
        fail(f"{what} raises {type(error).__name__}, not {expected.__name__}: {error}", contract)
    fail(f"{what} raises no error", contract)


def _at(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _short(strings: Mapping[str, str]) -> str:
    return str({key: value if len(value) < 100 else f"{value[:20]!r} and so on" for key, value in strings.items()})


def entries(stored: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Describe these tensors for a header."""
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}


def put(writer: Writer, stored: Mapping[str, Tensor]) -> None:
    """Write all tensors in reverse order, since any order must work."""
    for name in reversed(list(stored)):
        writer.write(name, stored[name])


_CHECKS = (
    tensors_come_back,
    metadata_comes_back,
    nothing_is_visible_before_close,
    abort_leaves_nothing,
    a_failed_write_leaves_the_old_file,
    damage_is_found,
    unreadable_files_are_errors,
    reading_never_changes_a_file,
    models_are_saved_and_loaded,
)
