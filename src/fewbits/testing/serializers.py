"""`check_serializer`: check a serializer against the promises of `Serializer`, `Writer` and `Reader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import torch
from hypothesis import strategies as st
from torch import Tensor

from fewbits.api import Result, quantize, verify
from fewbits.checkpoint.serializer import Entry, Header, Reader, Serializer, Writer
from fewbits.errors import CheckpointError, FewbitsError, FormatError
from fewbits.formats.loading import load
from fewbits.testing.check import EXAMPLES, Check, Setup, checks_of, copy_of, expect, expect_error, for_all
from fewbits.testing.environment import Snapshot, check_damage, files_in, folder, snapshot
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.strategies import tensors

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
        serializer: A new serializer.
        suffix: The end of its file names.
        max_examples: The number of examples that a check draws.

    Raises:
        ArgumentError: if `serializer` is not an instance of `Serializer`.
    """
    return checks_of(
        SerializerSetup(copy_of(serializer, Serializer, "check_serializer"), max_examples, suffix), __name__
    )


@attrs.frozen
class SerializerSetup(Setup[Serializer]):
    """A serializer to check.

    Attributes:
        suffix: The end of its file names.
    """

    suffix: str

    @contextmanager
    def path(self, before: bytes | None = None) -> Iterator[Path]:
        """Give a path in a new folder, which has a file with the bytes `before`, or none."""
        with folder() as there:
            path = there / f"model{self.suffix}"
            if before is not None:
                path.write_bytes(before)
            yield path

    def begin(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Writer:
        """Begin a file, and announce longer metadata than will follow."""
        announced = {key: value + " " * 9 for key, value in (metadata or {"key": "value"}).items()}
        return self.make().writer(path, Header(_entries(stored), announced))

    def write(self, path: Path, stored: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Snapshot:
        """Write a whole file.

        Returns:
            The tensors as read back before the file is closed.
        """
        with self.begin(path, stored, metadata) as writer:
            _put(writer, stored)
            read = _read(writer.seal(metadata or {}))
            writer.close()
        return read

    def read(self, path: Path) -> Snapshot:
        """Read all tensors of a file."""
        return _read(self.make().reader(path))

    def quantized(self) -> Result:
        """Quantize a model whose result this serializer saves."""
        return quantize(SmallModel(), "int8", serializer=self.make(), validate=False)


def tensors_come_back(setup: SerializerSetup) -> None:
    """Tensors of all dtypes, shapes and strides, under any names, are read back bit for bit.

    `Reader.entries` describes every tensor in the file. Writing into a tensor that was read does not change the file.
    """

    def come_back(stored: Mapping[str, Tensor]) -> None:
        with setup.path() as path:
            sealed = setup.write(path, stored)
            reader = setup.make().reader(path)
            expect(dict(reader.entries) == _entries(stored), f"the file has the entries {reader.entries}")
            for found in (sealed, setup.read(path)):
                wrong = sorted(name for name, bits in snapshot(stored).items() if found[name] != bits)
                expect(not wrong, f"read back with other bits: {', '.join(map(repr, wrong))}")
            before = path.read_bytes()
            for name in stored:
                reader.read(name).zero_()
                expect(path.read_bytes() == before, "writing into a tensor that was read changes the file")
            expect(setup.read(path) == snapshot(stored), "the file reads differently afterwards")

    come_back(TENSORS)
    for_all(setup.examples, come_back, st.dictionaries(_NAMES, tensors(), max_size=5))


def metadata_comes_back(setup: SerializerSetup) -> None:
    """`Reader.metadata` has the strings that were sealed.

    Strings survive in any language, with line ends and quotes, empty, long, or shorter than announced.
    """
    hard = {"größe": "重み\n\r\t\"'\\\0 \U0001f600", "empty": "", "long": "x" * 300_000, "fewbits.ledger": "[1, 2]"}

    def come_back(strings: dict[str, str]) -> None:
        with setup.path() as path:
            setup.write(path, TENSORS, strings)
            found = dict(setup.make().reader(path).metadata)
            expect(found == strings, f"metadata {_short(strings)} is read back as {_short(found)}")

    come_back(hard)
    for_all(setup.examples, come_back, st.dictionaries(_NAMES, st.text(st.characters(exclude_categories=["Cs"]))))


def a_file_appears_at_close(setup: SerializerSetup) -> None:
    """Until `Writer.close` the path does not change, whether a file was there or not; then it holds the new file alone.

    `Writer.abort` leaves the folder as it was, and after `close` it leaves the file.
    """
    for before in (None, b"another file"):
        for steps in (3, 2, 1, 0):
            with setup.path(before) as path, setup.begin(path, TENSORS) as writer:
                expected = {} if before is None else {path.name: before}
                calls: dict[str, Callable[[], object]] = {
                    "write": partial(_put, writer, TENSORS),
                    "seal": partial(writer.seal, {}),
                    "close": writer.close,
                }
                for name in list(calls)[:steps]:
                    expect(files_in(path.parent).get(path.name) == before, f"the path has changed before {name}")
                    calls[name]()
                if steps == len(calls):
                    expected = files_in(path.parent)
                    expect(expected.keys() == {path.name}, f"other files are left beside the file: {sorted(expected)}")
                    expect(setup.read(path) == snapshot(TENSORS), "the closed file has other tensors than were written")
                writer.abort()
                writer.abort()
                found = files_in(path.parent)
                expect(found == expected, f"abort leaves {sorted(found)}, not {sorted(expected)} as before")


def a_failed_write_leaves_the_old_file(setup: SerializerSetup) -> None:
    """An error while writing leaves the old file; so does a file with a missing tensor, which is an error."""
    with setup.path() as path:
        setup.write(path, {"old": torch.ones(3)})
        expected = files_in(path.parent)
        with suppress(InterruptedError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            raise InterruptedError
        expect(files_in(path.parent) == expected, "an error while writing changes the folder")
        sealed = False
        with suppress(FewbitsError), setup.begin(path, TENSORS) as writer:
            writer.write("mask", TENSORS["mask"])
            writer.seal({})
            sealed = True
        expect(not sealed, "a file without most of its tensors can be sealed")
        expect(files_in(path.parent) == expected, "an error in seal changes the folder")


def damage_is_found(setup: SerializerSetup) -> None:
    """`fewbits.verify` finds a flipped bit anywhere in a file, or the bit does not matter."""
    with setup.path() as path:
        setup.quantized().save(path)
        check_damage(path, setup.make())


def unreadable_files_are_errors(setup: SerializerSetup) -> None:
    """A file that is empty, cut in half or plain text raises `FormatError`.

    Reading a missing file raises `CheckpointError`, and so does writing into a missing folder.
    """
    with setup.path() as path:
        expect_error(CheckpointError, "a missing file", lambda: setup.make().reader(path))
        setup.write(path, TENSORS)
        half = path.read_bytes()[: path.stat().st_size // 2]
        for what, content in {"an empty file": b"", "text": b"no tensors here", "half a file": half}.items():
            other = path.with_name(f"other{setup.suffix}")
            other.write_bytes(content)
            expect_error(FormatError, what, partial(setup.read, other))
        missing = path.parent / "missing" / path.name
        expect_error(CheckpointError, "a folder that does not exist", lambda: setup.write(missing, TENSORS))


def models_are_saved_and_loaded(setup: SerializerSetup) -> None:
    """`Result.save`, `fewbits.verify` and `fewbits.load` work with it, by strings and by `Path`."""
    result = setup.quantized()
    with setup.path() as path:
        result.save(str(path))
        report = verify(path, SmallModel(), serializer=setup.make())
        expect(report.ok, f"verify found: {'; '.join(report.failures)}")
        expect(report.sqnr_db is not None, "verify measured nothing")
        loaded = load(path, serializer=setup.make())
        expect(snapshot(loaded) == snapshot(result.model), "fewbits.load gives other bits than were saved")
        model = load(str(path), into=SmallModel(seed=1), serializer=setup.make())
        with torch.no_grad():
            same = torch.equal(model(ids()), result.model(ids()))
        expect(same, "the loaded model computes other bits")


def _short(strings: Mapping[str, str]) -> str:
    return str({key: value if len(value) < 100 else f"{value[:20]!r} and so on" for key, value in strings.items()})


def _entries(stored: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Describe these tensors for a header."""
    return {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}


def _put(writer: Writer, stored: Mapping[str, Tensor]) -> None:
    """Write all tensors in reverse order, since any order must work."""
    for name in reversed(list(stored)):
        writer.write(name, stored[name])


def _read(reader: Reader) -> Snapshot:
    return snapshot({name: reader.read(name) for name in reader.entries})
