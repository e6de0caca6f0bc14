"""Checks of quantizers: what is written to files, and read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.checkpoint.codec import CODEC, Value
from fewbits.formats.loading import load
from fewbits.quantizers.base import Quantizer
from fewbits.testing.check import Contract, expect
from fewbits.testing.environment import not_importable, snapshot, undetected_damage
from fewbits.testing.models import SmallModel, ids
from fewbits.testing.quantizer_setup import QuantizerSetup, folder

_BITS = Contract(
    "fewbits.Quantizer.save", "Write the result to a file, or a directory of several, atomically, and read it back."
)
_BYTES = Contract("fewbits.Ledger.bytes_after", "the bytes of the file, its header aside.")
_DIGESTS = Contract("fewbits.verify", "digests, structure, and every element against its source")
_INTO = Contract("fewbits.load", "a float model of the same architecture, which may live on the meta device")
_UNPICKLED = Contract("fewbits.testing.check_quantizer", "A file is read without the class that made it.")


def files_give_back_every_bit(setup: QuantizerSetup) -> None:
    """What is loaded from a file is what was converted, bit for bit."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there:
        loaded = _saved_and_loaded(quantizer, there / "model.out")
        expect(snapshot(loaded) == snapshot(result), "a file gives back other bits than were written", _BITS)


def written_bytes_are_predicted(setup: QuantizerSetup) -> None:
    """A file holds the bytes that the ledger predicts before there is any."""
    quantizer = setup.prepared(SmallModel())
    predicted = {row.name: row.bytes_after for row in quantizer.ledger}
    quantizer.convert()
    with folder() as there:
        quantizer.save(there / "model.out")
        entries = quantizer.serializer.reader(there / "model.out").entries
    for row in quantizer.ledger:
        written = sum(entries[name].nbytes for name in CODEC.entries(row))
        expect(written == predicted[row.name], f"{row.name} has {written} bytes, not {predicted[row.name]}", _BYTES)
    total = sum(entry.nbytes for entry in entries.values())
    expect(total == quantizer.ledger.bytes_after, f"{total} bytes, not {quantizer.ledger.bytes_after}", _BYTES)


def damage_is_found(setup: QuantizerSetup) -> None:
    """A flipped bit anywhere in a file is found, or changes nothing that is read."""
    quantizer, _ = setup.converted(SmallModel())
    with folder() as there:
        quantizer.save(there / "model.out")
        missed, found = undetected_damage(there / "model.out", quantizer.serializer)
    expect(not missed, f"bits flipped in bytes {missed} change what is read, and verify finds nothing", _DIGESTS)
    expect(found > 0, "of all flipped bits verify finds none", _DIGESTS)


def files_load_into_models_on_meta(setup: QuantizerSetup) -> None:
    """A file fills a model that has no numbers yet, which then computes the same bits."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there:
        loaded = _saved_and_loaded(quantizer, there / "model.out", _on_meta())
        with torch.no_grad():
            same = torch.equal(loaded.eval()(ids()), result.eval()(ids()))
        expect(same, "a model that was loaded computes something else", _INTO)
        expect(snapshot(loaded) == snapshot(result), "a model that was loaded has other bits", _INTO)


def files_need_no_class(setup: QuantizerSetup) -> None:
    """A file can be read where the scheme's module cannot be imported."""
    quantizer, result = setup.converted(SmallModel())
    with folder() as there, not_importable(type(quantizer).__module__):
        loaded = _saved_and_loaded(quantizer, there / "model.out")
        expect(snapshot(loaded) == snapshot(result), "without its module, a file gives other bits", _UNPICKLED)


def _saved_and_loaded(quantizer: Quantizer, path: Path, into: nn.Module | None = None) -> Any:
    quantizer.save(path)
    if into is not None:
        return load(path, into=into, serializer=quantizer.serializer)
    values: dict[str, Value] = load(path, serializer=quantizer.serializer)
    return values


def _on_meta() -> SmallModel:
    with torch.device("meta"):
        return SmallModel()


FILE_CHECKS = (
    files_give_back_every_bit,
    written_bytes_are_predicted,
    damage_is_found,
    files_load_into_models_on_meta,
    files_need_no_class,
)
