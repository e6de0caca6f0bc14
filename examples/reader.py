"""Read a fewbits file with torch and safetensors alone, by docs/format.md: python reader.py FILE..."""

import json
import sys

import torch
from safetensors import safe_open


def unpack(words, bits, columns):
    """Unsigned codes out of rows of int32 words: a bitstream, least significant bit first."""
    stream = (words.unsqueeze(-1) >> torch.arange(32)).bitwise_and(1).flatten(1)[:, : columns * bits]
    return (stream.unflatten(1, (columns, bits)) << torch.arange(bits)).sum(-1)


def decode(row, stored):
    """One quantized tensor, in its own shape and dtype."""
    name, spec, layout, levels = row["name"], row["spec"], row["layout"], row["spec"]["levels"]
    scale, half = stored(f"{name}_scale"), 2 ** (row["spec"]["bits"] - 1)
    axes = [layout["view"][axis] for axis in layout["permutation"]]
    columns = torch.Size(axes[layout["row_axes"] :]).numel()
    width = spec["group_size"] or columns
    steps = torch.tensor(levels or range(-half, half), dtype=[torch.float32, torch.float64][scale.itemsize == 8])
    if bits := spec.get("scale_bits"):
        count = 2**bits >> spec["symmetric"]
        parts = unpack(stored(f"{name}_scale_codes").T, bits, len(scale)).T - count * spec["symmetric"]
        scale = scale.to(steps.dtype) * ((parts + (parts >= 0)) / count)
    values = steps[unpack(stored(f"{name}_packed"), spec["bits"], columns)]
    if not spec["symmetric"]:
        words = stored(f"{name}_zero_point").reshape(-1, scale[0].numel())
        values -= (unpack(words.T, spec["bits"], len(scale)).T - half).repeat_interleave(width, 1)[:, :columns]
    values *= scale.to(steps.dtype).reshape(len(scale), -1).repeat_interleave(width, 1)[:, :columns]
    order = sorted(range(len(axes)), key=layout["permutation"].__getitem__)
    return values.reshape(axes).permute(order).reshape(row["shape"]).to(getattr(torch, row["dtype"]))


def read(path):
    """Every tensor of the source by its name, dequantized."""
    with safe_open(path, framework="pt") as file:
        rows = {row["name"]: row for row in json.loads(file.metadata()["fewbits.ledger"])}
        holders = {n: rows[row["alias_of"] or n] for n, row in rows.items() if row["fate"] != "merged"}
        stored = file.get_tensor
        return {n: decode(r, stored) if r["fate"] == "quantized" else stored(r["name"]) for n, r in holders.items()}


for path in sys.argv[1:] if __name__ == "__main__" else ():
    for name, tensor in read(path).items():
        print(name, tuple(tensor.shape), tensor.dtype)
