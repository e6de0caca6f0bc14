"""How many bytes of a model get codes, and why others do not: python coverage.py [SOURCE [SCHEME]].

SOURCE is a safetensors file, or package.module:function, which returns a model; without it, a small model is shown.
"""

import importlib
import math
import sys
from collections import Counter

from torch import nn

import fewbits

SCHEMES = {"int4": fewbits.Int4Grouped, "int8": fewbits.Int8PerChannel, "fp16": fewbits.FP16Cast}


def demo() -> nn.Module:
    return nn.Sequential(nn.Embedding(1000, 256), nn.TransformerEncoderLayer(256, 4), nn.LSTM(256, 256))


def ledger_of(source: object, scheme: str = "int4") -> fewbits.Ledger:
    """Every tensor's fate, settled from names, shapes and dtypes: no weight is read."""
    quantizer = SCHEMES[scheme]()
    quantizer.prepare(source)
    return quantizer.ledger


def share(ledger: fewbits.Ledger, bits: int) -> float:
    """The share of the source's bytes that get codes of so many bits."""
    coded = [row for row in ledger if isinstance(row.spec, fewbits.QuantSpec) and row.spec.bits == bits]
    return sum(row.bytes_before for row in coded) / ledger.bytes_before


def large_and_kept(ledger: fewbits.Ledger) -> list[fewbits.LedgerRow]:
    """The tensors without codes that one would look for: two dimensions or more, 512 elements or more."""
    return [row for row in ledger if row.fate == "kept" and len(row.shape) >= 2 and math.prod(row.shape) >= 512]


def main(source: str | None = None, scheme: str = "int4") -> None:
    module, _, function = (source or "").partition(":")
    model = getattr(importlib.import_module(module), function)() if function else source or demo()
    ledger = ledger_of(model, scheme)
    for title, key in (("scheme", lambda row: row.scheme or row.fate), ("reason", lambda row: row.reason)):
        found = Counter()
        for row in ledger.stored:
            found[key(row)] += row.bytes_before
        print(f"by {title}:")
        for name, size in found.most_common():
            print(f"{size:15,} bytes {size / ledger.bytes_before:7.2%}  {name}")
    print(f"codes: int4 for {share(ledger, 4):.2%} of the bytes, int8 for {share(ledger, 8):.2%}")
    for row in large_and_kept(ledger):
        print(f"kept: {row.name} {row.shape}: {row.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
