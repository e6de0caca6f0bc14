"""`validate` with data: the outputs of the float model and of the quantized model, side by side."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, CalibrationError, ValidationError
from fewbits.extend import compare_outputs
from fewbits.validation.outputs import METRICS
from support.model_cases import Int3, blocks, inputs, tiny_lm, tokens

ALL = ("kl", "top1", "cosine", "sqnr", "perplexity")


def converted(model: nn.Module, scheme: fewbits.Quantizer | None = None) -> fewbits.Quantizer:
    quantizer = scheme or Int3()
    quantizer.prepare(model)
    quantizer.convert()
    return quantizer


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_metrics_are_those_of_all_positions_for_any_split_into_batches(sizes, seed):
    model, other = blocks(), blocks(seed)
    x = inputs(1, size=sum(sizes))[0]
    names = ("kl", "top1", "cosine", "sqnr")
    found = compare_outputs(model, other, list(x.split(sizes)), metrics=names)
    with torch.no_grad():
        a, b = model(x).double(), other(x).double()
    expected = {
        "kl": F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean"),
        "top1": (a.argmax(1) == b.argmax(1)).double().mean(),
        "cosine": F.cosine_similarity(a, b).mean(),
    }
    for name, value in expected.items():
        assert found.figures[name] == pytest.approx(float(value), rel=1e-4, abs=1e-9)
    if seed:
        assert found.figures["sqnr"] == pytest.approx(
            float(10 * (a.square().sum() / (a - b).square().sum()).log10()), abs=1e-3
        )
    assert (found.positions, found.samples, found.batches) == (len(x), len(x), len(sizes))


def test_a_model_that_is_compared_with_itself_differs_in_nothing():
    model = tiny_lm()
    found = compare_outputs(model, model, tokens(), metrics=ALL)
    assert found.figures["kl"] == 0
    assert found.figures["top1"] == 1
    assert found.figures["cosine"] == pytest.approx(1)
    assert found.figures["sqnr"] == math.inf
    assert found.figures["perplexity"] == found.figures["float_perplexity"]
    assert found.to_dict()["sqnr"] is None


class WritesIntoItsBatch(nn.Module):
    """Returns the mapping that it got, with its output in it, as `SentenceTransformer` does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, features):
        features.update(sentence_embedding=self.layer(features["x"]))
        return features


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_a_model_that_writes_its_output_into_the_batch_is_not_compared_with_itself(forward):
    model, batch = WritesIntoItsBatch(), {"x": torch.randn(8, 64)}
    quantized = fewbits.quantize(model, "int4", group_size=32).model
    found = compare_outputs(model, quantized, [batch], forward=forward)
    wanted = model(dict(batch))["sentence_embedding"]
    cosine = F.cosine_similarity(wanted, quantized(dict(batch))["sentence_embedding"]).mean()
    assert found.figures["cosine"] == pytest.approx(cosine.item())
    assert found.figures["cosine"] < 0.9999
    assert forward is not None or batch.keys() == {"x"}


def test_the_worst_batch_is_the_worst_for_each_metric():
    model, other = blocks(), blocks(1)
    names, batches = ("kl", "top1", "cosine", "sqnr"), inputs()
    alone = [compare_outputs(model, other, [batch], metrics=names).figures for batch in batches]
    worst = compare_outputs(model, other, batches, metrics=names).worst
    assert worst["kl"] == max(figures["kl"] for figures in alone)
    for name in ("top1", "cosine", "sqnr"):
        assert worst[name] == min(figures[name] for figures in alone)


def test_outputs_that_do_not_fit_one_block_of_the_computation_give_the_same_metrics(monkeypatch):
    model, other, names = blocks(), blocks(1), ("kl", "top1", "cosine", "sqnr")
    whole = compare_outputs(model, other, inputs(), metrics=names)
    monkeypatch.setattr("fewbits.validation.outputs._ELEMENTS", 50)
    assert compare_outputs(model, other, inputs(), metrics=names).figures == pytest.approx(whole.figures)


@pytest.mark.parametrize("form", ["tensor", "input_ids", "labels"])
def test_perplexity_is_that_of_the_next_token(form):
    model, other, batches = tiny_lm(), tiny_lm(1), tokens()
    with torch.no_grad():
        losses = [F.cross_entropy(other(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()) for x in batches]
    data = batches if form == "tensor" else [{"input_ids": x} for x in batches]
    forward = None
    if form == "labels":
        data = [{"input_ids": x, "labels": x} for x in batches]
        forward = lambda m, batch: m(batch["input_ids"])  # noqa: E731
    found = compare_outputs(model, other, data, forward=forward, metrics=("perplexity",))
    assert found.figures["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    own = compare_outputs(other, model, data, forward=forward, metrics=("perplexity",))
    assert found.figures["float_perplexity"] == own.figures["perplexity"]


def test_positions_that_the_attention_mask_excludes_do_not_count():
    model, other = tiny_lm(), tiny_lm(1)
    short = tokens(1, length=7)[0]
    padded = {"input_ids": F.pad(short, (0, 5)), "attention_mask": F.pad(torch.ones_like(short), (0, 5))}
    found = compare_outputs(model, other, [padded], metrics=ALL)
    expected = compare_outputs(model, other, [short], metrics=ALL)
    assert found.figures == pytest.approx(expected.figures, rel=1e-5)
    assert found.positions == short.numel()


def test_the_metrics_follow_from_the_output():
    assert compare_outputs(tiny_lm(), tiny_lm(1), tokens()).figures.keys() == {"kl", "top1"}
    assert compare_outputs(blocks(), blocks(1), inputs()).figures.keys() == {"cosine", "sqnr"}


def test_outputs_are_found_by_name_and_else_the_first_floating_tensor_counts():
    def embedding(model, x):
        return {"ids": x.long(), "token_embeddings": x, "sentence_embedding": model(x)}

    def tuple_of(model, x):
        return x.long(), model(x)

    expected = compare_outputs(blocks(), blocks(1), inputs()).figures
    assert compare_outputs(blocks(), blocks(1), inputs(), forward=embedding).figures == expected
    assert compare_outputs(blocks(), blocks(1), inputs(), forward=tuple_of).figures == expected


def test_validate_puts_the_metrics_into_the_report_the_summary_the_file_and_inspect(tmp_path, events):
    quantizer = converted(tiny_lm())
    report = quantizer.validate(tokens(), metrics=ALL)
    model = report.model
    assert model.figures.keys() == {*ALL, "float_perplexity"}
    assert report.to_dict()["model"] == model.to_dict()
    assert f"KL {model.figures['kl']:.4g} nats" in report.summary(200)
    assert [event["kl"] for event in events if event["event"] == "model_metrics"] == [model.figures["kl"]]
    quantizer.save(tmp_path / "lm.safetensors")
    quantizer.save(tmp_path / "lm", max_shard_size=2000)
    for path in (tmp_path / "lm.safetensors", tmp_path / "lm"):
        metadata = fewbits.checkpoint.reading.Checkpoint(path).metadata
        assert metadata.model_metrics["kl"] == float(f"{model.figures['kl']:.6g}")
        assert metadata.model_metrics["positions"] == model.positions
        assert metadata.model_metrics["worst_top1"] == float(f"{model.worst['top1']:.6g}")
    assert quantizer.validate().model is None
    quantizer.save(tmp_path / "plain.safetensors")
    assert not fewbits.checkpoint.reading.Checkpoint(tmp_path / "plain.safetensors").metadata.model_metrics


def test_the_one_call_form_compares_outputs_on_other_batches_than_the_calibration():
    result = fewbits.quantize(
        blocks(), Int3(rounding="gptq"), data=inputs(), samples=None, evaluate=inputs(2, seed=5), metrics=["sqnr"]
    )
    assert result.report.model.batches == 2
    assert result.report.model.figures.keys() == {"sqnr"}
    plain = fewbits.quantize(blocks(), Int3(), evaluate=inputs(2, seed=5), metrics=["sqnr"])
    assert result.report.model.figures["sqnr"] > plain.report.model.figures["sqnr"] + 3


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"kl": 1e-6}, r"KL .* nats of the model is above 1e-06 nats"),
        ({"top1": 0.9999}, r"top-1 agreement .*% of the model is below 99.99%"),
        ({"sqnr": 60}, r"SQNR .* dB of the model is below 60.00 dB"),
        ({"cosine": 1.0, "perplexity": 1.0}, r"cosine(.|\n)*perplexity .* of the model is above 1"),
    ],
)
def test_a_metric_beyond_its_limit_is_a_failure_of_the_model(limits, said):
    quantizer = converted(tiny_lm())
    with pytest.raises(ValidationError, match=said):
        quantizer.validate(tokens(), limits=limits)
    loose = {name: 0.0 if METRICS[name].rising else 1e9 for name in limits}
    assert quantizer.validate(tokens(), limits=loose).ok


def test_outputs_that_are_not_finite_are_a_failure_of_the_quantized_model():
    quantizer = converted(blocks())
    last = inputs()[-1]

    def forward(model, x):
        quantized = not isinstance(model.head.weight, nn.Parameter)
        return model(x) * (math.nan if quantized and torch.equal(x, last) else 1)

    report = quantizer.validate(inputs(), forward=forward, metrics=ALL[:4], on_failure="ignore")
    assert report.failures == ["the quantized model gives NaN or Inf in 1 of 4 batches"]
    assert all(math.isnan(figure) for figure in report.model.figures.values())
    assert report.to_dict()["model"]["kl"] is None
    limited = quantizer.validate(inputs(), forward=forward, limits={"kl": 9.0}, on_failure="ignore")
    assert len(limited.failures) == 2


BAD_OUTPUTS = {
    "holds NaN or Inf": lambda model, x: model(x) / 0,
    "without a floating tensor": lambda model, x: {"ids": x.long()},
    "is int64, and only floating": lambda model, x: model(x).argmax(1),
    "the quantized model one of shape": lambda model, x: model(x)[: 3 + isinstance(model.head.weight, nn.Parameter)],
    "NoneType without": lambda model, x: None,
}


@pytest.mark.parametrize("said", BAD_OUTPUTS)
def test_outputs_that_cannot_be_compared_are_refused_with_their_batch(said):
    quantizer = converted(blocks())
    with pytest.raises(CalibrationError, match=f"batch 1: .*{said}"):
        quantizer.validate(inputs(), forward=BAD_OUTPUTS[said])
    assert quantizer.validate().ok


@pytest.mark.parametrize("metric", ["kl", "top1", "perplexity"])
def test_metrics_of_logits_refuse_other_outputs(metric):
    with pytest.raises(CalibrationError, match=rf"{metric} compare logits.*last_hidden_state.*forward="):
        compare_outputs(
            blocks(), blocks(1), inputs(), forward=lambda m, x: {"last_hidden_state": m(x)}, metrics=[metric]
        )
    with pytest.raises(CalibrationError, match=rf"{metric} compare logits, and .* a tensor of shape \(24, 1\)"):
        compare_outputs(blocks(), blocks(1), inputs(), forward=lambda m, x: m(x)[:, :1], metrics=[metric])


@pytest.mark.parametrize("batch", [inputs(1)[0], {"x": inputs(1)[0]}, {"input_ids": torch.zeros(3, dtype=torch.long)}])
def test_perplexity_without_tokens_says_what_it_needs(batch):
    def forward(model, batch):
        return model(batch if isinstance(batch, torch.Tensor) else batch.get("x", inputs(1)[0]))

    with pytest.raises(CalibrationError, match=r"perplexity needs the next token .*input_ids or labels"):
        compare_outputs(blocks(), blocks(1), [batch], forward=forward, metrics=["perplexity"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (inputs(1)[0], "a single Tensor is one batch"),
        ({"x": inputs(1)[0]}, "a single dict is one batch"),
        (7, "batches must be an iterable"),
        ([], "the data has no batch"),
        (["text"], "a batch of type str cannot be fed by default"),
        ([torch.zeros(2, 5)], "batch 1, of type Tensor, made Blocks fail with RuntimeError"),
    ],
)
def test_data_that_cannot_be_run_is_refused_and_the_result_stays(data, said):
    quantizer = converted(blocks())
    with pytest.raises(CalibrationError, match=said):
        quantizer.validate(data)
    assert quantizer.validate().ok


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": ["kld"]}, "there is no metric 'kld' .did you mean 'kl'"),
        ({"metrics": "kl"}, "metrics must be a list of names"),
        ({"metrics": []}, "metrics must be a list of names"),
        ({"metrics": iter(["kl"])}, "metrics must be a list of names"),
        ({"limits": {"top5": 1}}, "there is no metric 'top5'"),
        ({"limits": 0.1}, "limits must be a mapping"),
        ({"limits": {"kl": math.nan}}, "the limit of kl must be a number"),
        ({"limits": {"kl": "low"}}, "the limit of kl must be a number"),
    ],
)
def test_unknown_metrics_and_limits_are_refused(settings, said):
    with pytest.raises(ArgumentError, match=said):
        converted(blocks()).validate(inputs(), **settings)


@pytest.mark.parametrize("setting", [{"metrics": ["kl"]}, {"limits": {"kl": 1}}, {"forward": lambda m, x: m(x)}])
def test_settings_of_a_comparison_need_data(setting):
    with pytest.raises(ArgumentError, match=f"{next(iter(setting))} without data"):
        converted(blocks()).validate(**setting)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluate": inputs(), "metrics": ["kld"]}, "did you mean 'kl'"),
        ({"evaluate": inputs(), "limits": {"kl": "low"}}, "the limit of kl must be a number"),
        ({"metrics": ["kl"]}, "metrics= without evaluate="),
        ({"limits": {"kl": 1}, "validate": False}, "limits= set up the validation"),
    ],
)
def test_quantize_refuses_settings_of_a_comparison_before_it_converts(settings, said):
    def converted(step):
        raise StopIteration(step)

    with pytest.raises(ArgumentError, match=said):
        fewbits.quantize(blocks(), "int8", progress=converted, **settings)


def test_a_wrong_fail_under_is_refused_before_the_data_runs():
    def run(model, batch):
        raise StopIteration

    with pytest.raises(ArgumentError, match="fail_under must be a number"):
        converted(blocks()).validate(inputs(), forward=run, fail_under="low")


def test_without_a_float_model_the_error_names_the_way_out(tmp_path):
    for source in (blocks().state_dict(), tmp_path / "net.safetensors"):
        fewbits.quantize(blocks(), "int8").save(tmp_path / "float.safetensors")
        with pytest.raises(CalibrationError, match=r"no forward whose outputs.*fewbits.extend.compare_outputs"):
            fewbits.quantize(source, "int8", evaluate=inputs())
    quantizer = converted(blocks().state_dict())
    with pytest.raises(CalibrationError, match=r"no forward whose outputs"):
        quantizer.validate(inputs())
    with pytest.raises(CalibrationError, match=r"inplace=True leaves no float model.*compare_outputs"):
        fewbits.quantize(blocks(), "int8", inplace=True, evaluate=inputs())
    quantizer = Int3()
    quantizer.prepare(blocks(), inplace=True)
    model = quantizer.convert()
    with pytest.raises(CalibrationError, match=r"inplace=True leaves no float model.*compare_outputs"):
        quantizer.validate(inputs())
    assert compare_outputs(blocks(), model, inputs()).figures["sqnr"] > 10
    for setting in ({"evaluate": inputs()}, {"metrics": ["sqnr"]}, {"limits": {"sqnr": 1}}):
        with pytest.raises(ArgumentError, match=f"{next(iter(setting))}= set up the validation, which validate=False"):
            fewbits.quantize(blocks(), "int8", validate=False, **setting)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": ["kl"]}, "metrics= without evaluate=: pass the batches"),
        ({"limits": {"kl": 1}}, "limits= without evaluate=: pass the batches"),
        ({"evaluate": inputs(), "metrics": ["kld"]}, "there is no metric 'kld'"),
        ({"evaluate": inputs(), "limits": {"top5": 1}}, "there is no metric 'top5'"),
    ],
)
def test_wrong_settings_of_a_comparison_are_refused_before_the_conversion(settings, said):
    steps = []
    with pytest.raises(ArgumentError, match=said):
        fewbits.quantize(blocks(), "int8", progress=steps.append, **settings)
    assert steps == []


def test_validation_tells_its_progress_in_samples():
    steps = []
    converted(blocks()).validate(inputs(), progress=steps.append)
    found = [(step.done, step.total, step.unit) for step in steps if step.activity == "compare"]
    assert found == [(24 * n, 96, "samples") for n in (1, 2, 3, 4)]


def test_a_model_in_training_mode_is_compared_in_eval_mode_and_stays_in_training_mode():
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.9), nn.Linear(64, 8)).train()
    report = fewbits.quantize(model, "int8", evaluate=inputs()).report
    assert report.model.figures["sqnr"] > 30
    assert model.training
