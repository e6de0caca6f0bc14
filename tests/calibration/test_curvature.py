"""The curvature predicts the divergence that small changes of weights cause, and leaves the model as it was."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewbits.calibration.curvature import curvatures
from fewbits.calibration.losses import loss_of
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.numerics.layout import Layout


class Logits(nn.Module):
    """A small classifier of tokens, with an output like that of transformers."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.body(self.embed(input_ids)).relu())}


def weights_of(model):
    return {name: Layout.of(p.shape) for name, p in model.named_parameters() if p.dim() == 2}


def tokens(batches=24, shape=(2, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 40, shape, generator=generator)} for _ in range(batches)]


def measured(model, changed, data, loss):
    with torch.no_grad():
        losses = [loss_of(loss, changed(**batch), model(**batch), batch) for batch in data]
    return float(torch.stack(losses).mean())


def disturbed(model, name):
    """A copy of the model with small noise in one weight, and the noise."""
    changed = copy.deepcopy(model)
    weight = changed.get_parameter(name)
    difference = torch.randn(weight.shape) * 0.05 * weight.detach().std()
    weight.data += difference
    return changed, difference


@pytest.mark.parametrize("tied", [False, True])
def test_kl_of_logits_is_predicted(tied):
    torch.manual_seed(0)
    model, data = Logits(tied), tokens(100)
    found = curvatures(model, weights_of(model), data, samples=None)
    assert found.divergence == "kl"
    for name in weights_of(model):
        changed, difference = disturbed(model, name)
        predicted = found.of_weights[name].error(difference)
        assert predicted == pytest.approx(measured(model, changed, data, "kl"), rel=0.25), name


def test_the_squared_error_of_other_outputs_is_predicted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    data = [torch.randn(8, 32) for _ in range(200)]
    found = curvatures(model, weights_of(model), data, samples=None)
    assert found.divergence == "mse"
    for name in weights_of(model):
        changed, difference = disturbed(model, name)
        losses = [loss_of("mse", changed(batch), model(batch), batch).item() for batch in data]
        assert found.of_weights[name].error(difference) == pytest.approx(sum(losses) / len(losses), rel=0.25), name


@given(st.integers(0, 2**32), st.integers(1, 63))
def test_errors_of_parts_add_up(seed, cut):
    torch.manual_seed(seed)
    model = nn.Linear(16, 64)
    curvature = curvatures(model, weights_of(model), [torch.randn(4, 16)]).of_weights["weight"]
    difference = torch.randn(64, 16)
    parts = curvature.error(difference[:cut]) + curvature.error(difference[cut:], cut)
    assert parts == pytest.approx(curvature.error(difference), rel=1e-12)
    assert curvature.error(2 * difference) == pytest.approx(4 * curvature.error(difference), rel=1e-12)


def test_the_model_is_the_same_afterwards():
    model = Logits().train()
    model.body.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = copy.deepcopy(model.state_dict())
    curvatures(model, weights_of(model), tokens(2))
    assert all(model.state_dict()[name].equal(value) for name, value in state.items())
    assert model.training
    assert not model.body.weight.requires_grad
    assert model.body.bias.requires_grad
    assert model.head.weight.grad.equal(torch.ones_like(model.head.weight))
    assert model.embed.weight.grad is None
    assert not model.head.weight._post_accumulate_grad_hooks


def test_the_same_call_gives_the_same_curvature():
    model = Logits()
    found = [curvatures(model, weights_of(model), tokens(3)).of_weights for _ in range(2)]
    for name, curvature in found[0].items():
        assert curvature.rows.equal(found[1][name].rows)
        assert curvature.columns.equal(found[1][name].columns)


def test_positions_outside_the_attention_mask_do_not_count():
    model = Logits()
    short = {"input_ids": torch.randint(0, 20, (1, 8)), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.full((1, 5), 30)], 1),
        "attention_mask": torch.cat([short["attention_mask"], torch.zeros(1, 5, dtype=torch.long)], 1),
    }
    found = [curvatures(model, weights_of(model), [batch]).of_weights["embed.weight"] for batch in (short, padded)]
    assert not found[1].rows[30]
    torch.testing.assert_close(found[0].rows, found[1].rows)


def test_a_weight_without_influence_has_no_curvature():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    found = curvatures(model, weights_of(model), [torch.randn(2, 8)]).of_weights
    assert found["unused.weight"].is_zero
    assert not found["used.weight"].is_zero


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Integers(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1)


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        (Detached(4, 4), [torch.randn(1, 4)], "no gradient"),
        (Integers(4, 4), [torch.randn(1, 4)], "no floating tensor"),
        (nn.Linear(4, 4), [], "no batch"),
        (nn.Linear(4, 4), torch.randn(1, 4), "wrap it in a list"),
        (nn.Linear(4, 4), [torch.randn(1, 5)], "batch 1"),
    ],
)
def test_data_that_gives_no_gradient_is_refused(model, data, text):
    with pytest.raises(CalibrationError, match=text):
        curvatures(model, weights_of(model), data)
    assert model.weight.requires_grad
    assert model.weight.grad is None


def test_inference_mode_is_refused():
    model = nn.Linear(4, 4)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        curvatures(model, weights_of(model), [torch.randn(1, 4)])
