"""Training checkpoints: which of their entries are state dicts is said, and one is taken by its name."""

import argparse
import collections
import pathlib
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits.cli.commands import run as run_cli
from support.lifecycle_helpers import quantize_small


def checkpoint():
    """A checkpoint of a training loop: weights, their average, the optimizer's state, and more."""
    model = nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "model_state": model.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "average": {"ema": {name: tensor / 2 for name, tensor in model.state_dict().items()}},
        "random": (random.getstate(), torch.get_rng_state()),
        "options": argparse.Namespace(path=pathlib.PurePosixPath("a"), sizes=[1, 2]),
        "counts": collections.Counter("abc"),
        "history": collections.defaultdict(list, loss=[0.1]),
        "last": collections.deque([1]),
        "kinds": {"a"},
    }


@pytest.fixture
def saved(tmp_path):
    torch.save(checkpoint(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


CANDIDATES = r"the entries 'model_state', 'average.ema' look like state dicts.*--entry model_state.*entry='model_state'"


def test_a_training_checkpoint_is_refused_with_the_entries_that_look_like_state_dicts(saved):
    with pytest.raises(fewbits.errors.FormatError, match=CANDIDATES):
        fewbits.plan(saved, "int8")
    with pytest.raises(fewbits.errors.SourceError, match=CANDIDATES):
        fewbits.plan(checkpoint(), "int8")


def test_one_entry_alone_is_named_and_not_guessed(tmp_path):
    lightning = {"epoch": 1, "state_dict": {"model.weight": torch.ones(32, 32)}, "loops": {"fit": {"state_dict": {}}}}
    torch.save(lightning, tmp_path / "last.ckpt")
    with pytest.raises(
        fewbits.errors.FormatError, match="the entry 'state_dict' looks like a state dict: take it with"
    ):
        fewbits.plan(tmp_path / "last.ckpt", "int8")
    planned = fewbits.plan(tmp_path / "last.ckpt", "int8", entry="state_dict")
    assert [row.name for row in planned.ledger] == ["model.weight"]


@pytest.mark.parametrize("entry", ["model_state", "average.ema"])
def test_an_entry_of_a_file_and_of_a_mapping_is_quantized_as_the_state_dict_alone(saved, tmp_path, entry):
    loaded = torch.load(saved, weights_only=False)
    alone = loaded["model_state"] if entry == "model_state" else loaded["average"]["ema"]
    torch.save(alone, tmp_path / "alone.pt")
    quantize_small(tmp_path / "alone.pt", "int8", output=tmp_path / "expected")
    quantize_small(saved, "int8", entry=entry, output=tmp_path / "file")
    quantize_small(loaded, "int8", entry=entry).save(tmp_path / "mapping")
    run = fewbits.FleetRun(saved, "int8", entry=entry, output=tmp_path / "fleet", min_elements=1)
    run.finish([run.write(file) for file in run.begin()])
    for made in ("file", "mapping", "fleet"):
        assert (tmp_path / made).read_bytes() == (tmp_path / "expected").read_bytes()
    assert fewbits.verify(tmp_path / "file", saved, entry=entry).ok


def test_the_command_line_takes_an_entry(saved, tmp_path, monkeypatch, capsys):
    def cli(*arguments):
        monkeypatch.setattr("sys.argv", ["fewbits", *map(str, arguments)])
        return run_cli(), "".join(capsys.readouterr())

    quantize = ["quantize", saved, "-o", tmp_path / "out", "--scheme", "int8"]
    assert cli(*quantize)[0] == 2
    assert "--entry model_state" in cli(*quantize, "--dry-run")[1]
    assert cli(*quantize, "--entry", "model_state", "--dry-run")[0] == 0
    assert cli(*quantize, "--entry", "model_state")[0] == 0
    assert cli("verify", tmp_path / "out", "--against", saved, "--entry", "model_state")[0] == 0
    assert cli("verify", tmp_path / "out", "--against", saved, "--entry", "average.ema")[0] == 1
    assert "--against" in cli("verify", tmp_path / "out", "--entry", "average.ema")[1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("model_stat", r"no entry 'model_stat' \(did you mean 'model_state'\?\); the entries"),
        ("model_state.weigh", "no entry 'model_state.weigh'"),
        ("epoch", "int"),
        ("optimizer_state", "a state dict maps names to tensors"),
        (3, "must be the name of an entry, not 3"),
        ("", "no entry ''"),
    ],
)
def test_an_entry_that_is_no_state_dict_is_a_named_error(saved, entry, message):
    for source in (saved, checkpoint()):
        with pytest.raises(
            (fewbits.errors.FormatError, fewbits.errors.ArgumentError, fewbits.errors.SourceError), match=message
        ):
            fewbits.plan(source, "int8", entry=entry)


def test_an_entry_goes_with_nothing_that_has_none(tmp_path):
    source = {"weight": torch.ones(32, 32)}
    quantize_small(source, "int8").save(tmp_path / "out")
    save_file(source, tmp_path / "in.safetensors")
    for whole in (nn.Linear(32, 32), tmp_path / "in.safetensors"):
        with pytest.raises(fewbits.errors.ArgumentError, match="entry='a' needs a"):
            fewbits.plan(whole, "int8", entry="a")
    with pytest.raises(fewbits.errors.ArgumentError, match="against="):
        fewbits.verify(tmp_path / "out", entry="a")


def test_a_run_is_not_gone_on_with_from_another_entry(tmp_path):
    states = {name: {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)} for name in ("model", "ema")}
    torch.save(states, tmp_path / "last.ckpt")

    def stop(step):
        if step.done:
            raise KeyboardInterrupt

    output = fewbits.Output(tmp_path / "out", resume=True)
    with pytest.raises(KeyboardInterrupt):
        quantize_small(tmp_path / "last.ckpt", "int8", entry="model", output=output, progress=stop)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"source: last\.ckpt \(entry\) changed"):
        quantize_small(tmp_path / "last.ckpt", "int8", entry="ema", output=output)
    result = quantize_small(tmp_path / "last.ckpt", "int8", entry="model", output=output)
    assert sum(share.resumed for share in result.quantizer.shares) > 0


def test_of_two_entries_with_one_name_the_state_dict_is_taken(tmp_path):
    weight = torch.ones(2, 2)
    saved = {"a.b": weight, "a": {"b": {"weight": weight}}}
    torch.save({"epoch": 1, "state": saved}, tmp_path / "last.ckpt")
    plan = fewbits.plan(tmp_path / "last.ckpt", "int8", entry="state.a.b", min_elements=1)
    assert [row.name for row in plan.ledger] == ["weight"]


NAMES = st.text("ab.", max_size=3)


@given(st.recursive(st.just(torch.ones(2, 2)), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6))
def test_every_entry_that_is_named_can_be_taken(tmp_path_factory, saved):
    path = tmp_path_factory.getbasetemp() / "any.pt"
    torch.save({"epoch": 1, "state": saved}, path)
    with pytest.raises(fewbits.errors.FormatError) as refused:
        fewbits.plan(path, "int8", min_elements=1)
    entry = str(refused.value).rpartition("entry=")[2].strip("'")
    if "entry=" in str(refused.value):
        assert fewbits.plan(path, "int8", entry=entry, min_elements=1).ledger
