"""Measure the memory of ``from_pretrained`` with a `FewbitsConfig`: ``python tests/stress/from_pretrained.py [MB]``.

A Llama of about so many megabytes (default 1200) is written in several shards. A process of its own loads it and
reports the rise of its peak resident memory (VmHWM), which must stay under the quantized size, the largest shard and
200 MB. A tiny model warms the process up before. Linux only.

``python tests/stress/from_pretrained.py --decode DIR`` compares how long ``generate`` takes for a causal language model
that ``from_pretrained`` quantized, and for one that `fewbits.quantize` quantized; both must write the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MB = 10**6
SPARE = 200 * MB
SHARDS = 6


def write(folder: Path, size: int) -> int:
    """Write a Llama of about `size` bytes in float32, a shard at a time; return the bytes of the largest shard."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = 1024, 4096
    layer = 4 * (4 * hidden * hidden + 3 * hidden * inner)
    settings: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 16}
    config = LlamaConfig(**settings, num_hidden_layers=max(1, size // layer), vocab_size=512)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names, index, largest = list(shapes), {}, 0
    step = -(-len(names) // SHARDS)
    for number, start in enumerate(range(0, len(names), step)):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: torch.randn(shapes[name]) * 0.02 for name in names[start : start + step]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
        largest = max(largest, sum(tensor.nbytes for tensor in part.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


def peak() -> int:
    """Return the peak of resident memory so far, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def load(tiny: str, folder: str, scheme: str) -> None:
    """Load both models in this process, and print the rise of the peak and the bytes of the quantized model."""
    from transformers import AutoModelForCausalLM

    from fewbits.integrations.transformers import FewbitsConfig

    AutoModelForCausalLM.from_pretrained(tiny, quantization_config=FewbitsConfig(scheme))
    before = peak()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitsConfig(scheme))
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(json.dumps({"rise": peak() - before, "stored": stored}))


def measure(folder: Path, size: int, scheme: str) -> tuple[dict[str, int], int]:
    """Return the figures of a model of about so many bytes, and the allowed rise."""
    write(folder / "tiny", 0)
    largest = write(folder / "model", size)
    command = [sys.executable, __file__, "--load", str(folder / "tiny"), str(folder / "model"), scheme]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    figures: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return figures, figures["stored"] + largest + SPARE


def decode(folder: str) -> int:
    """Time both models in turn; the exit code is 1 if the first takes 10 % longer, or writes other tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    import fewbits
    from fewbits.integrations.transformers import FewbitsConfig

    torch.set_num_threads(1)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=FewbitsConfig("int4")),
        fewbits.quantize(source, "int4", validate=False).model,
    ]
    ids = torch.arange(100, 116)[None]
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24}
    least, texts = [float("inf")] * 2, [ids, ids]
    for turn in range(12):
        start = time.process_time()
        texts[turn % 2] = models[turn % 2].generate(ids, **settings)
        least[turn % 2] = min(least[turn % 2], time.process_time() - start)
    same = torch.equal(*texts)
    print(f"from_pretrained {least[0]:.2f} s, quantize {least[1]:.2f} s; the tokens are {'' if same else 'not '}equal")
    return 0 if same and least[0] <= 1.1 * least[1] else 1


def main(arguments: list[str]) -> int:
    """Measure int8 and int4; the exit code is 1 if a rise is too large."""
    size = int(arguments[0]) * MB if arguments else 1200 * MB
    held = True
    for scheme in ("int8", "int4"):
        with tempfile.TemporaryDirectory() as folder:
            figures, allowed = measure(Path(folder), size, scheme)
        held &= figures["rise"] <= allowed
        print(
            f"{scheme}: the peak rises by {figures['rise'] / MB:.0f} MB, quantized {figures['stored'] / MB:.0f} MB, "
            f"allowed {allowed / MB:.0f} MB"
        )
    return 0 if held else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(*sys.argv[2:])
    elif sys.argv[1:2] == ["--decode"]:
        sys.exit(decode(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
