"""Module classes by behaviour: copying, pickling, moving and reloading a quantized module change nothing.

Rows are the classes with a quantized form of their own, with every scheme, and all other classes of torch.nn that have
parameters. Columns are the journeys.
"""

import copy
import io

import pytest
import torch
from torch import nn

from nn.any_cases import as_the_original, converted, same_outputs
from nn.cases import SCHEMES, TYPICAL, Case, convert, pickled, reloaded, storages, tensors_in
from nn.combinations import ALL, ONE_OF_A_CLASS, SOME, parts, same_tensors, unless_refused

pytestmark = pytest.mark.usefixtures("reference_only")

OWN_FORMS = [(case, scheme) for case in TYPICAL for scheme in SCHEMES]


def saved_whole(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def to_meta_and_back(module: nn.Module) -> nn.Module:
    state = copy.deepcopy(module.state_dict())
    module = module.to("meta")
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    module = module.to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def assigned_from_meta(module: nn.Module) -> nn.Module:
    state = module.state_dict()
    module = copy.deepcopy(module).to("meta")
    module.load_state_dict(state, assign=True)
    return module


def shared(module: nn.Module) -> nn.Module:
    module = module.cpu().share_memory()
    assert all(tensor.is_shared() for tensor in tensors_in(module) if tensor.numel())
    return module


JOURNEYS = {
    "to the device it is on": lambda module: module.to("cpu"),
    "to a dtype": lambda module: module.to(torch.float32),
    "deepcopy": lambda module: copy.deepcopy(copy.deepcopy(module)),
    "shallow copy": copy.copy,
    "pickle": lambda module: pickled(copy.deepcopy(module)),
    "torch.save": saved_whole,
    "share_memory": shared,
    "state dict": reloaded,
    "assigned state dict": lambda module: reloaded(module, assign=True),
    "meta and to_empty": to_meta_and_back,
    "assigned into meta": assigned_from_meta,
    "train and eval": lambda module: module.train().eval().requires_grad_(False),
}


def quantized(case, scheme):
    return convert(case.module(), scheme) if isinstance(case, Case) else converted(case.module(), scheme)[0]


def check_journey(case, scheme, journey):
    module = quantized(case, scheme)
    held, state, expected = parts(module), copy.deepcopy(module.state_dict()), case.run(module)
    _, arrived = as_the_original(f"{journey} of {case}", JOURNEYS[journey], case.module(), module)
    assert type(arrived) is type(module)
    assert same_tensors(parts(arrived), held)
    assert same_tensors(arrived.state_dict(), state)
    assert same_outputs(case.run(arrived), expected)


@pytest.mark.parametrize(
    ("case", "scheme", "journey"),
    [
        pytest.param(
            case, scheme, journey, marks=[pytest.mark.slow] * ((i + j) % 3 > 0), id=f"{case}-{scheme}-{journey}"
        )
        for i, (case, scheme) in enumerate([*OWN_FORMS, *SOME])
        for j, journey in enumerate(JOURNEYS)
    ],
)
def test_a_module_arrives_unchanged(case, scheme, journey):
    check_journey(case, scheme, journey)


@pytest.mark.slow
@pytest.mark.parametrize("journey", JOURNEYS)
def test_every_combination_arrives_unchanged(journey):
    for case, scheme in ALL:
        with unless_refused():
            check_journey(case, scheme, journey)


@pytest.mark.parametrize(("case", "scheme"), [*OWN_FORMS, *ONE_OF_A_CLASS], ids=str)
def test_a_deepcopy_shares_no_memory(case, scheme):
    module = quantized(case, scheme)
    assert not storages(module) & storages(copy.deepcopy(module))
