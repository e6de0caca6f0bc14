"""A quantized model goes to another process as the float model does."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import fewbits
from fewbits.nn.stored import StoredWeight
from nn.cases import same_bits


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    return model


def quantized(make, scheme, **settings) -> nn.Module:
    torch.manual_seed(0)
    return fewbits.quantize(make(), scheme, include=["*"], **settings).model.eval()


def models() -> dict[str, nn.Module]:
    """Every order of codes that a CPU can have (words, bytes, tiles), and a weight that has no codes."""
    linear = lambda: nn.Linear(64, 96)  # noqa: E731
    return {
        "words": quantized(linear, "int4", compute="exact"),
        "bytes": quantized(linear, "int8"),
        "tiles": quantized(linear, "int4"),
        "float16": quantized(linear, "fp16"),
        "int8 inputs": quantized(linear, "int8", activations="dynamic"),
        "static inputs": quantized(linear, "int8", activations="static", data=[torch.randn(4, 64)]),
        "tied": quantized(tied, "int8"),
        "attention": quantized(lambda: nn.TransformerEncoderLayer(64, 2, 96, batch_first=True), "int8"),
    }


X = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 64)


@torch.no_grad()
def outputs(of: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: model(X) for name, model in of.items()}


def assert_same_outputs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not same_bits(one[name], other[name])] == []
    assert one.keys() == other.keys()


def write_outputs(_: int, of: dict[str, nn.Module], place: str) -> None:
    torch.save({"outputs": outputs(of), "tied": of["tied"][0].weight_stored is of["tied"][2].weight_stored}, place)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_a_spawned_process_takes_quantized_models_of_every_layout(tmp_path: Path):
    of, place = models(), str(tmp_path / "outputs.pt")
    before = outputs(of)
    mp.spawn(write_outputs, (of, place))
    there = torch.load(place)
    assert_same_outputs(before, there["outputs"])
    assert there["tied"]
    assert_same_outputs(before, outputs(of))


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("copied", ["queue", "pickle", "torch.save", "deepcopy"])
def test_quantized_models_of_every_layout_are_copied(copied):
    of = models()
    if copied == "queue":  # as in `Queue.put` and `Queue.get`
        there = ForkingPickler.loads(ForkingPickler.dumps(of))
    elif copied == "torch.save":
        torch.save(of, file := io.BytesIO())
        there = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        there = pickle.loads(pickle.dumps(of)) if copied == "pickle" else copy.deepcopy(of)
    assert_same_outputs(outputs(of), outputs(there))


def test_a_model_that_went_through_a_queue_shares_its_memory_as_a_float_model_does():
    for model in models().values():
        there = ForkingPickler.loads(ForkingPickler.dumps(model))
        pairs = zip(stored(model), stored(there), strict=True)
        for one, other in pairs:
            assert all(buffer.is_shared() for buffer in other.buffers())
            assert [buffer.shape for buffer in one.buffers()] == [buffer.shape for buffer in other.buffers()]


def stored(model: nn.Module) -> list[StoredWeight]:
    return [module for module in model.modules() if isinstance(module, StoredWeight)]
