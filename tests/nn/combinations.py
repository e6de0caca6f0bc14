"""Classes of torch.nn with schemes, as the tests of all of torch.nn take them. Importing this builds every case."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from nn.any_cases import ANY_CASES, EVERYTHING, wanted
from nn.cases import in_turn, same_bits

#: The cases in which there is something to quantize, and the first of every class.
QUANTIZABLE = tuple(case for case in ANY_CASES if wanted(case.module()))
FIRST = tuple({case.cls: case for case in reversed(QUANTIZABLE)}.values())

ALL = [(case, scheme) for case in QUANTIZABLE for scheme in EVERYTHING]
ALL_IN_TURN = in_turn(QUANTIZABLE, EVERYTHING)
#: Every case with one scheme, and every class with one scheme; slow tests use all combinations.
SOME = list(zip(QUANTIZABLE, itertools.cycle(EVERYTHING), strict=False))
ONE_OF_A_CLASS = [(case, scheme) for case, scheme in SOME if case in FIRST]


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Codes and scales."""
    return {name: tensor.clone() for name, tensor in model.named_buffers() if "_stored." in name}


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(same_bits(tensor, b[name]) for name, tensor in a.items())


@contextlib.contextmanager
def unless_refused():
    """Continue where torch refuses the original."""
    try:
        yield
    except pytest.skip.Exception as refusal:
        print(refusal)
