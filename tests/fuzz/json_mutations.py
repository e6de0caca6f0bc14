"""Mutations of JSON values: other values, other types, duplicate keys, extreme nesting. Most results are valid JSON.

JSON that Python values cannot express (duplicate keys, deep nesting, huge numbers) is represented by markers in strings
and keys, which `dump` expands.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

_NUMBERS = (
    0, 1, -1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**33, 2**53, 2**61, 2**62, 2**63 - 1, 2**63,
    2**64, 10**30, 0.0, -0.0, 0.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_WORDS = (
    "", "x", "\ud800", "\x00", "../x", "../../model.safetensors", "/etc/passwd", "model.safetensors", "C:\\x", "C:x",
    ".", "F64", "F32", "F16", "BF16", "I64", "I32", "U8", "I8", "BOOL", "F8_E4M3", "C64", "F4", "float64", "float32",
    "float16", "bfloat16", "int64", "int32", "float8_e4m3fn", "complex64", "nn", "quantized", "cast", "kept", "alias",
    "affine", "tensor", "channel", "group", "dynamic", "static", "nearest", "free", "pt", "1", "2", "__metadata__",
    "0" * 64,
)  # fmt: skip
_KEYS = (
    "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "name", "spec", "layout", "alias_of",
)  # fmt: skip

_TWICE, _DEEP, _HUGE = "\x00twice", "\x00deep", "\x00huge"
_MARKED = re.compile(r'"\\u0000(deep|huge)(\d+)"')


def dump(value: Any) -> str:
    """The JSON text of a value, with expanded markers."""
    text = json.dumps(value, separators=(",", ":"))
    text = _MARKED.sub(lambda m: "9" * int(m[2]) if m[1] == "huge" else "[" * int(m[2]) + "]" * int(m[2]), text)
    return text.replace("\\u0000twice", "")


def changed(value: Any, rng: Random) -> Any:
    """Change one random place in the value and return it. Objects and lists may be changed in place."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return _other(value, rng)
    holder, key = rng.choice(places)
    if rng.random() < 0.5:
        # Most places hold scalars. Half of the time, choose an object or list instead.
        holder, key = rng.choice([place for place in places if isinstance(place[0][place[1]], (dict, list))] or places)
    change = rng.choice((_replace, _replace, _replace, _swap, _copy, _drop, _rename, _repeat, _shuffle))
    change(holder, key, places, rng)
    return value


def _places(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _replace(holder: Any, key: Any, places: Any, rng: Random) -> None:
    holder[key] = _other(holder[key], rng)


def _other(value: Any, rng: Random) -> Any:
    """A different value: a variation of this one, or a random one."""
    if type(value) in (int, float) and rng.random() < 0.6:
        if value != value or abs(value) == float("inf"):
            return 0
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value // 2, float(value), value + 2**32, str(value))
        )
    if isinstance(value, str) and rng.random() < 0.4:
        at = rng.randrange(len(value) + 1)
        return rng.choice((value[:at], value + "x", value[:at] + chr(rng.randrange(128)) + value[at + 1 :], value * 2))
    if isinstance(value, list) and rng.random() < 0.6:
        return rng.choice((value[:-1], value[1:], value * 2, [*value, 1], [*value, 0], [value], value[::-1]))
    number, word, depth = rng.choice(_NUMBERS), rng.choice(_WORDS), rng.choice((50, 990, 10_000))
    others = (number, number, word, word, None, True, False, [], {}, [number], {rng.choice(_KEYS): word}, [[]])
    return rng.choice((*others, f"{_DEEP}{depth}", f"{_HUGE}{rng.choice((30, 5_000))}"))


def _swap(holder: Any, key: Any, places: Any, rng: Random) -> None:
    """Swap with another value of the same type."""
    alike = [(h, k) for h, k in places if type(h[k]) is type(holder[key])]
    other, at = rng.choice(alike)
    if not isinstance(holder[key], (dict, list)):  # a container could end up inside itself
        holder[key], other[at] = other[at], holder[key]


def _copy(holder: Any, key: Any, places: Any, rng: Random) -> None:
    other, at = rng.choice([(h, k) for h, k in places if type(h[k]) is type(holder[key])])
    other[at] = json.loads(json.dumps(holder[key]))


def _drop(holder: Any, key: Any, places: Any, rng: Random) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, places: Any, rng: Random) -> None:
    if isinstance(holder, dict):
        known = [k for h, k in places if isinstance(k, str)]
        other = rng.choice((f"{key}x", key[:-1], rng.choice(_WORDS), rng.choice(_KEYS), rng.choice(known)))
        holder[other] = holder.pop(key)


def _repeat(holder: Any, key: Any, places: Any, rng: Random) -> None:
    """Repeat a key in an object, or an element in a list."""
    again = json.loads(json.dumps(holder[key]))
    if isinstance(holder, dict):
        holder[rng.choice((f"{key}{_TWICE}", f"{key}2", f"{key}_scale"))] = again
    else:
        holder.insert(key, again)


def _shuffle(holder: Any, key: Any, places: Any, rng: Random) -> None:
    if isinstance(holder, list):
        rng.shuffle(holder)
    else:
        items = [*holder.items()]
        rng.shuffle(items)
        holder.clear()
        holder.update(items)
