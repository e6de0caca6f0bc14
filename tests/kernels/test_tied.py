"""One stored weight that a Linear layer multiplies with and an Embedding reads rows of."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fewbits
from fewbits import QuantSpec
from fewbits.kernels import features
from fewbits.numerics.tensor import same_bits
from kernels.kernel_cases import INT8, Of, exactly, noise_db, normal

SPECS = [
    INT8,
    QuantSpec(bits=8, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel", symmetric=False),
    QuantSpec(bits=8, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=32),
    QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False),
    QuantSpec(bits=4, granularity="tensor"),
    QuantSpec(bits=8, granularity="channel", activations="dynamic"),
    QuantSpec(bits=5, granularity="channel"),
]
ROWS, COLUMNS = 100, 96


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(ROWS, COLUMNS)
        self.head = nn.Linear(COLUMNS, ROWS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


@pytest.fixture(params=SPECS, ids=str)
def model(request):
    return fewbits.quantize(Tied(), Of(request.param), validate=False).model


IDS = torch.tensor([[0, 99, 31], [32, 63, 64]])


@torch.no_grad()
def test_rows_are_read_exactly_whatever_the_layout(model):
    stored, expected = model.tokens.weight_stored, exactly(model)
    assert stored is model.head.weight_stored
    everything = torch.arange(ROWS)
    for compute in ("auto", "exact", "int8", "auto"):
        fewbits.set_compute(model, compute)
        assert model.tokens.weight_stored is model.head.weight_stored
        for ids in (everything, everything.flip(0), IDS, torch.tensor(5), torch.tensor([], dtype=torch.long)):
            assert same_bits(model.tokens(ids), expected.tokens(ids))
            assert same_bits(model.tokens(ids.int()), expected.tokens(ids.int()))
        assert same_bits(model.tokens.weight, expected.head.weight)


def test_the_layout_is_private_where_there_is_one(model):
    spec, layout = model.head.weight_stored.spec, model.tokens.weight_stored.weight_layout().name
    tiles = "int4_tiles" if features.tile_width() else "packed_int32"
    assert layout == ("int8_rows" if spec.bits == 8 else tiles)


@torch.no_grad()
def test_the_whole_model_computes_what_it_should(model):
    expected = exactly(model)
    x = normal(200, COLUMNS)
    for compute in ("auto", "int8"):
        fewbits.set_compute(model, compute)
        assert noise_db(model(IDS), expected(IDS)) > 25
        assert noise_db(model.head(x), expected.head(x)) > 25


@pytest.mark.parametrize("row", [-1, ROWS, 110, 127, 128, 10_000])
@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_a_row_that_is_not_there_is_an_error_as_it_is_in_torch(model, row, compute):
    fewbits.set_compute(model, compute)
    with pytest.raises(IndexError):
        Tied().tokens(torch.tensor([row]))
    with pytest.raises(IndexError):
        model.tokens(torch.tensor([3, row]))


def test_copies_stay_tied(model):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float32)):
        assert other.tokens.weight_stored is other.head.weight_stored
        assert same_bits(other.tokens.weight, model.tokens.weight)
        with torch.no_grad():
            assert torch.equal(other(IDS), model(IDS))


def test_a_state_dict_has_one_copy_of_the_codes_for_both(model):
    state = model.state_dict()
    assert state["tokens.weight_packed"].data_ptr() == state["head.weight_packed"].data_ptr()
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state)
    assert all(same_bits(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(("compute", "layout"), [("auto", "plain_int8"), ("exact", "packed_int32")])
def test_an_embedding_alone_has_no_kernels(compute, layout):
    model = fewbits.quantize(nn.Embedding(ROWS, COLUMNS), Of(INT8), validate=False).model
    fewbits.set_compute(model, compute)
    assert model.weight_stored.weight_layout().name == layout
    assert not model.weight_stored.prepared().kernels


@torch.no_grad()
def test_a_row_that_is_left_out_of_training_and_one_that_is_scaled():
    source = nn.Embedding(ROWS, COLUMNS, padding_idx=3, max_norm=1.0)
    model = fewbits.quantize(copy.deepcopy(source), Of(INT8), validate=False).model
    assert noise_db(model(IDS), source(IDS)) > 30
