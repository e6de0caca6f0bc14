"""`fewbits.tune`: scales follow the float model's outputs, codes stay, and held-out data decides."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fewbits
from fewbits.calibration.factors import standing_in
from fewbits.calibration.losses import default_loss, loss_of
from fewbits.calibration.recomputing import checkpointed
from fewbits.errors import ArgumentError, CalibrationError, NonFiniteError
from fewbits.extend import Tuning
from fewbits.nn.packed import PackedWeight
from fewbits.numerics.scales import rescaled
from fewbits.quantizers.schemes import SCHEMES
from support.lifecycle_helpers import FEWER_EXAMPLES, quantize_small, small

NF4 = (-1.0, -0.6, -0.4, -0.2, 0.0, 0.2, 0.5, 1.0)
SPECS = [
    fewbits.QuantSpec(bits=4, granularity="group", group_size=8),
    fewbits.QuantSpec(bits=3, granularity="group", group_size=5, symmetric=False, scale_dtype=torch.float16),
    fewbits.QuantSpec(bits=3, granularity="group", group_size=16, levels=NF4, scale_dtype=torch.bfloat16),
    fewbits.QuantSpec(bits=4, granularity="channel"),
    fewbits.QuantSpec(bits=4, granularity="tensor"),
    fewbits.QuantSpec(bits=4, granularity="group", group_size=8, scale_bits=6, scale_dtype=torch.float16),
]


class Scheme(fewbits.Quantizer):
    """A scheme with any spec."""

    def __init__(self, spec, **options):
        self.spec = spec
        super().__init__(**options)


class Net(nn.Module):
    """Two layers with a norm between them; the output has logits."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm, self.head = nn.Linear(width, 24), nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": 3 * self.head(torch.relu(self.norm(self.up(x))))}


def batches(seed=0, count=8, width=16, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator) for _ in range(count)]


def quantized(model, spec=SPECS[0]):
    """A quantized copy that computes exactly."""
    return quantize_small(model, small(Scheme, spec), compute="exact", on_failure="ignore").model


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def damaged(model):
    """Multiply the scales of each row by a factor of its own, as no rounding does."""
    for stored in packed(model).values():
        params = stored.value().params()
        rows = len(params.scale)
        log_factor = torch.linspace(0.7, 1.4, rows).log().reshape(rows, *[1] * (params.scale.dim() - 1))
        changed = rescaled(params, log_factor, torch.zeros(()), stored.spec)
        stored.rescale(changed, attrs.evolve(stored.spec, rounding="free"))
    return model


@torch.no_grad()
def kl(model, reference, data):
    """The mean KL divergence, computed here."""
    found = []
    for x in data:
        p, q = (torch.log_softmax(m(x)["logits"], -1) for m in (reference, model))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(found) / len(found)


@FEWER_EXAMPLES
@given(st.sampled_from(SPECS), st.integers(0, 100), st.floats(1e-4, 0.5), st.integers(1, 2))
def test_the_result_is_never_worse_on_held_out_data(spec, seed, learning_rate, epochs):
    model = Net(seed).eval()
    result, held_out = quantized(model, spec), batches(seed + 1, 2)
    before = kl(result, model, held_out)
    tuned = fewbits.tune(result, model, batches(seed, 3), held_out=held_out, learning_rate=learning_rate, epochs=epochs)
    after = kl(result, model, held_out)
    assert after <= before
    assert (tuned.before, tuned.after) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-4))
    assert tuned.changed == (tuned.after < tuned.before)


@FEWER_EXAMPLES
@given(st.sampled_from(SPECS), st.integers(0, 100))
def test_codes_stay_and_scales_keep_their_dtype_and_stay_sound(spec, seed):
    model = Net(seed).eval()
    result = quantized(model, spec)
    before = {name: stored.value() for name, stored in packed(result).items()}
    fewbits.tune(result, model, batches(seed), learning_rate=0.05)
    for name, stored in packed(result).items():
        old, new = before[name], stored.value()
        assert torch.equal(old.packed, new.packed)
        assert (new.scale.dtype, new.scale.shape) == (old.scale.dtype, old.scale.shape)
        assert bool((new.scale > 0).all() & new.scale.isfinite().all())
        assert new.spec == (old.spec if torch.equal(old.scale, new.scale) else attrs.evolve(old.spec, rounding="free"))


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_wrong_scales_are_found_from_data(spec):
    model = Net().eval()
    result = damaged(quantized(model, spec))
    tuned = fewbits.tune(result, model, batches(), epochs=6, learning_rate=0.1)
    assert tuned.after < 0.5 * tuned.before


def test_each_scale_of_a_row_gets_a_factor_of_its_own():
    model = Net().eval()
    result = quantized(model)
    before = {name: stored.value().scale for name, stored in packed(result).items()}
    fewbits.tune(result, model, batches(), epochs=4)
    factors = packed(result)["up.weight_stored"].value().scale / before["up.weight_stored"]
    assert float((factors[:, 0] / factors[:, 1]).log().abs().max()) > 1e-4


def test_a_tuned_result_is_described_saved_loaded_and_verified(tmp_path):
    model = Net().eval()
    result = quantize_small(model, "int4", group_size=8)
    assert result.report.ok
    tuned = fewbits.tune(result.model, model, batches(), epochs=4)
    assert tuned.changed
    assert tuned.tensors == 2
    row = result.quantizer.ledger["up.weight"]
    assert row.tuned
    assert row.reason.endswith("; tuned")
    assert row.spec.rounding == "free"
    assert not result.quantizer.ledger["up.bias"].tuned
    report = result.quantizer.validate()
    assert report.ok
    assert report.tensors[0].measurement is not None
    result.save(tmp_path / "tuned.safetensors")
    found = fewbits.verify(tmp_path / "tuned.safetensors", model)
    assert found.ok, found.failures
    loaded = fewbits.load(tmp_path / "tuned.safetensors", into=Net())
    assert torch.equal(loaded(batches()[0])["logits"], result.model(batches()[0])["logits"])


def test_measurements_from_before_tuning_are_not_written(tmp_path):
    model = Net().eval()
    result = quantize_small(model, "int4", group_size=8)
    result.save(tmp_path / "before.safetensors")
    fewbits.tune(result.model, model, batches(), epochs=4)
    result.save(tmp_path / "after.safetensors")
    metrics = [
        fewbits.extend.SafetensorsSerializer().reader(tmp_path / f"{name}.safetensors").metadata["fewbits.metrics"]
        for name in ("before", "after")
    ]
    assert "up.weight" in metrics[0]
    assert metrics[1] == "{}"


def test_a_model_quantized_in_place_is_tuned_and_its_report_says_what_is_not_known():
    model = Net().eval()
    reference = copy.deepcopy(model)
    result = quantize_small(model, "int4", group_size=8, inplace=True)
    assert fewbits.tune(model, reference, batches(), epochs=4).changed
    report = result.quantizer.validate()
    assert report.ok
    assert report.unchecked == ("errors: no source to compare with",)


def test_biases_and_norms_are_tuned_where_asked_and_the_float_model_keeps_its_own(tmp_path):
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    result = quantize_small(model, "int4", group_size=8)
    result.model.norm.weight = model.norm.weight  # shared with the float model
    flags = [parameter.requires_grad for parameter in result.model.parameters()]
    tuned = fewbits.tune(result.model, model, batches(), epochs=4, what=["biases", "norms"])
    assert tuned.tensors == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "norm.w" not in name)
    ledger = result.quantizer.ledger
    assert [row.name for row in ledger if row.tuned] == ["up.bias", "norm.weight", "norm.bias", "head.bias"]
    assert ledger["up.bias"].reason == "a bias is never quantized; tuned"
    assert not torch.equal(result.model.up.bias, before["up.bias"])
    assert [parameter.requires_grad for parameter in result.model.parameters()] == flags
    report = result.quantizer.validate()
    assert report.ok
    assert any("tuned, so it differs from the source" in note for note in report.notes)
    result.save(tmp_path / "tuned.safetensors")
    assert fewbits.verify(tmp_path / "tuned.safetensors", model).ok


def test_a_dequantized_copy_of_a_tuned_model_can_be_quantized_again():
    model = Net().eval()
    result = quantize_small(model, "int4", group_size=8)
    fewbits.tune(result.model, model, batches(), epochs=4, what=["scales", "norms"])
    again = quantize_small(fewbits.dequantize(result.model), "int4", group_size=8)
    assert not any(row.tuned for row in again.ledger)
    assert again.report.ok


class Nth:
    """A function that does something else at one of its calls."""

    def __init__(self, function, at, instead):
        self.function, self.at, self.instead, self.calls = function, at, instead, 0

    def __call__(self, *args):
        self.calls += 1
        return (self.instead if self.calls == self.at else self.function)(*args)


def interrupt(*_):
    raise KeyboardInterrupt


def fail(*_):
    raise ZeroDivisionError


def distance(output, reference):
    return (output["logits"] - reference["logits"]).square().mean()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"progress": Nth(print, 3, interrupt)}, KeyboardInterrupt),
        ({"forward": Nth(lambda model, x: model(x), 12, fail)}, CalibrationError),
        ({"loss": Nth(distance, 4, fail)}, CalibrationError),
        ({"loss": Nth(distance, 4, lambda *outputs: torch.nan * distance(*outputs))}, NonFiniteError),
    ],
    ids=["interrupted", "forward", "loss", "nan"],
)
def test_after_a_failure_the_model_is_as_before(options, error):
    model = Net().eval()
    result = quantized(model).train()
    result.head.bias.grad = torch.ones(10)
    result.norm.weight.requires_grad_(False)
    grads = {name: parameter.grad for name, parameter in result.named_parameters()}
    before, stored = copy.deepcopy(result.state_dict()), packed(result)
    with pytest.raises(error):
        fewbits.tune(result, model, batches(), what=["scales", "biases", "norms"], learning_rate=0.1, **options)
    assert packed(result) == stored
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.state_dict().items())
    assert {name: parameter.grad for name, parameter in result.named_parameters()} == grads
    assert [name for name, parameter in result.named_parameters() if not parameter.requires_grad] == ["norm.weight"]
    assert result.training
    assert result.up.training
    assert not model.training
    assert not any("forward" in vars(module) for module in result.modules())
    assert not any(module._forward_pre_hooks for module in result.modules())


def test_a_failure_while_scales_are_written_takes_back_those_that_were(monkeypatch):
    model = Net().eval()
    result = quantized(model)
    before, rescale, calls = copy.deepcopy(result.state_dict()), PackedWeight.rescale, []

    def failing(stored, params, spec):
        calls.append(stored)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rescale(stored, params, spec)

    monkeypatch.setattr(PackedWeight, "rescale", failing)
    with pytest.raises(KeyboardInterrupt):
        fewbits.tune(result, model, batches(), epochs=4)
    assert len(calls) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.state_dict().items())
    assert {stored.spec.rounding for stored in packed(result).values()} == {"nearest"}


def test_the_same_call_gives_the_same_bits():
    model = Net().eval()
    states = []
    for _ in range(2):
        result = quantized(model)
        torch.rand(3)  # the state of the random generator does not matter
        fewbits.tune(result, model, batches(), epochs=2)
        states.append(result.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# Any module.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x)


class Own(nn.Module):
    """A module that multiplies by its parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Reader(nn.Module):
    """A module that reads the weight of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


def images(seed):
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def rows(seed):
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


def ids(seed):
    return torch.randint(0, 12, (2, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), rows),
        (lambda: nn.Conv2d(4, 8, 3), images),
        (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), images),
        (lambda: nn.Embedding(12, 8), ids),
        (lambda: nn.EmbeddingBag(12, 8), ids),
        (lambda: nn.LSTM(8, 8, batch_first=True), rows),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), rows),
        (Attention, rows),
        (Tied, ids),
        (Own, rows),
        (Reader, rows),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), rows),
    ],
    ids=["linear", "conv", "transposed", "embedding", "bag", "lstm", "layer", "mha", "tied", "own", "reader", "norm"],
)
def test_weights_of_any_module_are_tuned(make, batch):
    torch.manual_seed(0)
    model = make().eval()
    result = quantize_small(model, "int4", group_size=4, skip_types=(), on_failure="ignore").model
    damaged(result)
    before = {name: stored.value() for name, stored in packed(result).items()}
    assert before
    tuned = fewbits.tune(result, model, [batch(seed) for seed in range(8)], epochs=4, learning_rate=0.02)
    assert tuned.after < 0.9 * tuned.before
    for name, stored in packed(result).items():
        assert torch.equal(before[name].packed, stored.value().packed)
        assert not torch.equal(before[name].scale, stored.value().scale)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(4, 8, 3)], ids=["linear", "conv"])
def test_rounded_inputs_are_part_of_the_loss(make, activations):
    torch.manual_seed(0)
    model = make().eval()
    data = [(rows if isinstance(model, nn.Linear) else images)(seed) for seed in range(8)]
    result = quantize_small(model, "int8", activations=activations, data=data).model
    with torch.no_grad():
        expected = float(loss_of("mse", result(data[0]), model(data[0]), data[0]))
    tuned = fewbits.tune(result, model, data[1:], held_out=data[:1])
    assert tuned.before == pytest.approx(expected, rel=1e-3)


def test_a_compiled_model_is_tuned_and_then_compiled_again():
    model = Net().eval()
    result = quantized(model)
    compiled = torch.compile(result, backend="eager")
    x = batches()[0]
    before = compiled(x)["logits"]
    assert fewbits.tune(compiled, model, batches(), epochs=2).changed
    assert not torch.equal(compiled(x)["logits"], before)
    torch.testing.assert_close(compiled(x)["logits"], result(x)["logits"])


def test_parameters_that_were_added_to_a_result_may_be_tuned_too():
    model = Net().eval()
    result = quantize_small(model, "int4", group_size=8)
    result.model.norm = nn.Sequential(result.model.norm, nn.LayerNorm(24))
    fewbits.tune(result.model, model, batches(), what=["norms"], epochs=2)
    assert not any(row.tuned for row in result.quantizer.ledger)


def test_a_tied_weight_stays_tied():
    torch.manual_seed(0)
    model = Tied().eval()
    result = quantize_small(model, "int4", group_size=4, skip_types=())
    fewbits.tune(damaged(result.model), model, [ids(seed) for seed in range(8)], learning_rate=0.02)
    assert result.model.embed.weight_stored is result.model.head.weight_stored
    assert result.quantizer.ledger["embed.weight"].tuned
    assert result.quantizer.ledger["head.weight"].alias_of == "embed.weight"


# The gradient.


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.scale_bits is None], ids=str)  # others round scales
def test_the_gradient_of_a_factor_is_that_of_the_decoded_weight(spec):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(20, 6), attrs.evolve(spec, scale_dtype=torch.float64))
    x = torch.randn(3, 20)
    with standing_in(layer, tuned=True) as (weight,):
        each = weight.tune_each_scale()
        layer(x).square().sum().backward()
        found = weight.by_row.grad
        with torch.no_grad():
            for factors, grad in [(weight.by_row, found), *([] if each is None else [(each, each.grad)])]:
                at = tuple(size - 1 for size in factors.shape)
                losses = []
                for step in (1e-3, -1e-3):
                    factors[at] = step
                    losses.append(float(layer(x).double().square().sum()))
                    factors[at] = 0
                assert float(grad[at]) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2, abs=1e-2)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


def test_blocks_are_computed_again_and_give_the_same_gradients():
    torch.manual_seed(0)
    model, calls = quantized(nn.Sequential(Residual(), Residual(), Residual())), []
    model[1].register_forward_hook(lambda *_: calls.append("block"))
    model[1].layer.register_forward_hook(lambda *_: calls.append("layer"))
    x, grads = rows(0), []
    for again in (False, True):
        with standing_in(model, tuned=True) as weights, ExitStack() as stack:
            if again:
                stack.enter_context(checkpointed(model, lambda: model(x)))
                calls.clear()
            model(x).square().sum().backward()
            grads.append([weight.by_row.grad for weight in weights])
    assert calls == ["layer", "block", "layer"]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


# Losses.


def test_logits_are_compared_as_distributions_and_other_outputs_by_mean_squares():
    assert default_loss({"logits": torch.ones(2, 3)}) == "kl"
    assert default_loss(torch.ones(2, 3)) == "mse"
    assert default_loss((torch.ones(2, 3), None)) == "mse"


def test_the_losses_have_their_usual_values():
    torch.manual_seed(0)
    a, b = torch.randn(2, 300, 5), torch.randn(2, 300, 5)
    expected = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True) / 600
    assert float(loss_of("kl", {"logits": a}, {"logits": b}, None)) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss_of("mse", a, b, None)) == pytest.approx(float((a - b).square().mean() / b.square().mean()))
    both = {"first": a, "rest": (b, [torch.tensor(1), None])}
    assert float(loss_of("mse", both, {"first": b, "rest": (b, None)}, None)) == pytest.approx(
        float((a - b).square().mean() / b.square().mean()) / 2
    )
    cosine = 1 - float(F.cosine_similarity(a, b, -1).mean())
    assert float(loss_of("cosine", a, b, None)) == pytest.approx(cosine, rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_positions_outside_the_attention_mask_do_not_count(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = loss_of(loss, a, b, {"attention_mask": mask})
    a[mask == 0] = 100.0
    assert torch.equal(loss_of(loss, a, b, {"attention_mask": mask}), expected)
    assert not torch.equal(loss_of(loss, a, b, {}), expected)


def test_a_loss_of_ones_own_decides():
    model = Net().eval()
    result = damaged(quantized(model))

    def loss(output, reference):
        return (output["logits"] - reference["logits"])[:, 0].abs().mean()

    tuned = fewbits.tune(result, model, batches(), loss=loss, learning_rate=0.02, epochs=4)
    assert tuned.loss == "loss"
    assert tuned.after < tuned.before


# Data.


def test_without_held_out_data_one_batch_in_eight_is_held_out():
    model, seen = Net().eval(), []

    def forward(net, x):
        seen.append(float(x[0, 0]))
        return net(x)

    data = [torch.full((1, 16), float(number)) for number in range(1, 18)]
    with pytest.raises(CalibrationError, match="one batch"):
        fewbits.tune(quantized(model), model, data[:1])
    fewbits.tune(quantized(model), model, data, forward=forward, epochs=1)
    held_out = [number for number in set(seen) if seen.count(number) > 4]
    assert held_out == [1.0, 9.0, 17.0]


def test_samples_limit_the_data_and_the_rest_is_reported(events):
    model, steps = Net().eval(), []
    fewbits.tune(quantized(model), model, batches(size=4), samples=12, progress=steps.append)
    assert [(step.activity, step.unit, step.done, step.total) for step in steps] == [
        ("tune", "samples", 4, 8),
        ("tune", "samples", 8, 8),
    ]
    assert {"event": "data_left", "log_level": "info"}.items() <= next(
        e for e in events if e["event"] == "data_left"
    ).items()
    tuned = next(event for event in events if event["event"] == "tuned")
    assert (tuned["steps"], tuned["loss"]) == (2, "kl")


def test_an_iterator_is_read_once():
    model = Net().eval()
    assert fewbits.tune(quantized(model), model, iter(batches()), epochs=2).steps == 14


# Errors.


def no_grad_forward(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ArgumentError, "epochs must be an integer from 1 up, not 0"),
        ({"learning_rate": 0}, ArgumentError, "learning_rate must be a number above 0, at most 1, not 0"),
        ({"what": "scales"}, ArgumentError, r"a list of some of 'scales', 'biases', 'norms', such as \['scales'\]"),
        ({"what": ["codes"]}, ArgumentError, "what must be a list of some of"),
        ({"what": [["scales"]]}, ArgumentError, "what must be a list of some of"),
        ({"loss": "l1"}, ArgumentError, "loss must be 'kl', 'mse', 'cosine', or a function"),
        ({"samples": 0}, ArgumentError, "samples must be an integer from 1 up"),
        ({"data": []}, CalibrationError, "the data has no batch"),
        ({"held_out": []}, CalibrationError, "the data has no batch"),
        ({"data": torch.ones(2, 16)}, CalibrationError, "wrap it in a list"),
        ({"data": [torch.ones(2, 3)] * 2}, CalibrationError, "batch 2, of type Tensor, made Net fail"),
        ({"forward": lambda *_: None}, CalibrationError, "no floating tensor from the quantized model"),
        ({"loss": lambda *_: 1.0}, CalibrationError, "a floating tensor of one element, not float"),
        ({"loss": lambda o, _: o["logits"]}, CalibrationError, r"not a tensor of shape \(4, 10\)"),
        ({"forward": no_grad_forward}, CalibrationError, "no gradient with respect to the tuned tensors"),
        ({"reference": nn.Linear(16, 7)}, CalibrationError, r"\(4, 10\) from the quantized model, \(4, 7\)"),
        ({"reference": None}, ArgumentError, "two models"),
        ({"quantized": Net()}, ArgumentError, "no weight of this Net has codes"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused(options, error, message):
    model = Net().eval()
    given = {"quantized": quantized(model), "reference": model, "data": batches()} | options
    with pytest.raises(error, match=message):
        fewbits.tune(given.pop("quantized"), given.pop("reference"), given.pop("data"), **given)


def test_tuning_in_inference_mode_is_refused():
    model = Net().eval()
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"outside of torch\.inference_mode"):
        fewbits.tune(quantized(model), model, batches())


def test_a_model_is_not_its_own_reference():
    result = quantized(Net())
    with pytest.raises(ArgumentError, match="the quantized model twice"):
        fewbits.tune(result, result, batches())


# In one call.


def test_quantize_tunes_between_conversion_and_validation():
    model = Net().eval()
    result = quantize_small(model, "int4", group_size=8, data=batches(), tune=4)
    assert result.tuned.changed
    assert result.ledger["up.weight"].tuned
    assert result.ledger is result.quantizer.ledger
    assert result.report.ok
    assert result.report.tensors[0].measurement is not None
    asked = quantize_small(model, "int4", group_size=8, data=batches(), tune=Tuning(epochs=2, loss="mse"))
    assert (asked.tuned.loss, asked.tuned.steps) == ("mse", 14)
    assert quantize_small(model, "int4", group_size=8, data=batches()).tuned is None


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "fp16"])
def test_every_scheme_with_codes_can_be_tuned_and_its_bounds_hold(scheme, tmp_path):
    model = Net().eval()
    tuning = Tuning(learning_rate=0.1)
    result = quantize_small(model, scheme, data=batches(), tune=tuning, on_failure="ignore", fail_under=0)
    assert result.report.ok, result.report.failures
    result.save(tmp_path / "tuned.safetensors")
    found = fewbits.verify(tmp_path / "tuned.safetensors", model, fail_under=0)
    assert found.ok, found.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "tune= needs data="),
        ({"inplace": True}, "needs the float model beside the quantized one"),
        ({"source": Net().state_dict()}, "a state dict or a file has no forward"),
        ({"tune": True}, "a number of epochs from 1 up, or a Tuning, not True"),
        ({"data": iter(batches())}, "reads the data more than once"),
    ],
)
def test_quantize_refuses_to_tune_without_what_tuning_needs(options, message):
    given = {"source": Net(), "data": batches(), "tune": 1} | options
    with pytest.raises(ArgumentError, match=message):
        quantize_small(given.pop("source"), "int4", **given)


def test_one_batch_without_held_out_data_is_refused_before_anything_runs():
    steps = []
    with pytest.raises(CalibrationError, match="the data has one batch"):
        quantize_small(Net(), "int4", data=batches()[:1], tune=1, progress=steps.append)
    assert steps == []
