"""`observe`: the kinds of batches, and the state of the model during the call and after it."""

import itertools
import json
import math
import weakref
from collections import UserDict, namedtuple
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits import Int8PerChannel, LayerSelector, State
from fewbits.calibration.batches import samples_in
from fewbits.calibration.running import run
from fewbits.calibration.watch import InputWatch
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.extend import Observed, Step
from support.lifecycle_helpers import Watcher, mlp

X = torch.arange(32.0).reshape(2, 16)
Pair = namedtuple("Pair", ["x", "target"])


def prepared(model=None, **options):
    quantizer = Int8PerChannel(selector=LayerSelector(min_elements=1), **options)
    return quantizer, quantizer.prepare(model or mlp())


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, 3), [X, torch.ones(2)], Pair(X, None), {"input": X}, UserDict(input=X)],
    ids=["tensor", "tuple", "pair", "list", "named tuple", "mapping", "user mapping"],
)
def test_a_batch_is_fed_by_its_kind(batch):
    seen = []
    quantizer, _ = prepared(observer=Watcher(seen.append))
    quantizer.observe([batch])
    assert torch.equal(seen[0], X)
    assert quantizer.state is State.OBSERVED


@pytest.mark.parametrize(
    "batch", [None, 3, "text", [], (), [[1.0]], [None, X], {X}, object()], ids=[str(i) for i in range(9)]
)
def test_a_batch_that_cannot_be_fed_is_refused_with_a_remedy(batch):
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match=rf"type {type(batch).__name__} cannot be fed.*forward="):
        quantizer.observe([batch])
    assert quantizer.state is State.PREPARED


def test_forward_feeds_batches_that_cannot_be_fed_by_default():
    seen = []
    quantizer, model = prepared(observer=Watcher(seen.append))
    quantizer.observe([{"deep": [X]}], forward=lambda m, batch: (m is model) and m(batch["deep"][0]))
    assert torch.equal(seen[0], X)


@pytest.mark.parametrize("batches", [[], iter(()), (x for x in ()), [X[:0]]])
def test_no_batch_at_all_is_refused(batches):
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match="the data has no batch"):
        quantizer.observe(batches)
    assert quantizer.state is State.PREPARED


def test_an_iterator_that_is_used_up_is_refused_the_second_time():
    quantizer, _ = prepared()
    batches = iter([X])
    quantizer.observe(batches)
    with pytest.raises(CalibrationError, match="used before"):
        quantizer.observe(batches)
    assert quantizer.state is State.OBSERVED


class Remembers(nn.Linear):
    """A layer that records the mode in which it ran."""

    modes = ()

    def forward(self, x):
        self.modes = (*self.modes, (self.training, torch.is_grad_enabled()))
        return super().forward(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_runs_in_eval_mode_without_gradients(inplace):
    quantizer = Int8PerChannel(selector=LayerSelector(min_elements=1))
    model = quantizer.prepare(nn.Sequential(nn.Linear(16, 16), Remembers(16, 4)).train(), inplace=inplace)
    quantizer.observe([X, X])
    assert model[1].modes == ((False, False),) * 2
    assert model[1].training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_restored_one_by_one(fails):
    model = mlp().train()
    model[1].eval()
    quantizer, copy = prepared(model)

    def forward(m, batch):
        if fails:
            raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        quantizer.observe([X], forward=forward)
    assert [m.training for m in copy] == [True, False, True]
    assert [m.training for m in model] == [True, False, True]
    assert copy.training
    assert quantizer.state is (State.PREPARED if fails else State.OBSERVED)


def test_statistics_of_normalizations_do_not_move():
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)).train()
    quantizer, copy = prepared(model)
    quantizer.observe([X])
    assert torch.equal(copy[1].running_mean, torch.zeros(4))
    assert copy[1].num_batches_tracked == 0


def test_an_error_of_the_loader_reaches_the_user_unchanged():
    def loader():
        yield X
        raise OSError("disk")

    quantizer, copy = prepared()
    with pytest.raises(OSError, match="disk"):
        quantizer.observe(loader())
    assert copy.training
    assert quantizer.state is State.PREPARED


def test_data_for_a_state_dict_is_refused():
    with pytest.raises(CalibrationError, match="no forward to observe"):
        fewbits.quantize(mlp().state_dict(), "int8", data=[X])


def test_observing_is_optional_and_changes_nothing_if_no_observer_needs_it():
    with_data = fewbits.quantize(mlp(), "int8", data=[X]).model
    assert torch.equal(with_data[0].weight, fewbits.quantize(mlp(), "int8").model[0].weight)


def test_a_data_loader_can_be_passed_directly():
    dataset = torch.utils.data.TensorDataset(torch.rand(8, 16), torch.arange(8))
    seen = []
    quantizer, _ = prepared(observer=Watcher(seen.append))
    quantizer.observe(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert [tuple(x.shape) for x in seen] == [(4, 16), (4, 32)] * 2


class Features(nn.Module):
    """A model that takes all its inputs in one mapping, as `SentenceTransformer` does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, features, **options):
        return self.linear(features["x"] * features["mask"])


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_one_argument_if_the_forward_asks_for_it(kind):
    seen = []
    quantizer, _ = prepared(Features(), observer=Watcher(seen.append))
    assert quantizer.observe([kind(x=X, mask=torch.ones(2, 1))]) == Observed(2, 1)
    assert torch.equal(seen[0], X)


def test_calibration_data_in_mappings_goes_to_a_model_that_takes_one_mapping():
    data = [{"x": X, "mask": torch.ones(2, 1)}] * 3
    result = fewbits.quantize(Features(), "int8", activations="static", data=data, min_elements=1)
    assert result.report.observed == Observed(6, 3)
    assert result.model.linear.weight_stored.input_scale.item() == pytest.approx(31 / 127)


# The number of samples that are run.


def counting(sizes, taken):
    """Yield batches of these sizes, and record them in the list `taken`."""
    for size in sizes:
        taken.append(size)
        yield torch.ones(size, 16)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40) | st.none())
def test_it_stops_with_the_batch_that_reaches_the_samples(sizes, samples):
    taken = []
    observed = run(nn.Identity(), counting(sizes, taken), samples=samples)
    sums = list(itertools.accumulate(sizes))
    needed = next((index for index, total in enumerate(sums, 1) if samples and total >= samples), len(sizes))
    assert taken == sizes[:needed]
    unknown = samples is not None and sums[needed - 1] >= samples
    assert observed == Observed(sums[needed - 1], needed, more=None if unknown else False)


def test_an_endless_loader_stops_at_150_samples():
    endless = (torch.ones(4, 2) for _ in itertools.count())
    assert run(nn.Identity(), endless) == Observed(152, 38, more=None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 40) | st.none())
def test_observe_knows_whether_data_is_left_of_a_source_with_a_length(sizes, samples):
    observed = run(nn.Identity(), Sized(sizes), samples=samples)
    assert observed.samples == sum(sizes[: observed.batches])
    assert observed.more is (observed.batches < len(sizes))


def test_observe_takes_no_batch_from_a_generator_that_it_does_not_run():
    quantizer, _ = prepared()
    batches = (torch.ones(2, 16) for _ in range(5))
    calls = [quantizer.observe(batches, samples=4) for _ in range(3)]
    assert calls == [Observed(4, 2, more=None), Observed(4, 2, more=None), Observed(2, 1, more=False)]


def test_the_calls_of_observe_add_up_in_the_report():
    quantizer, _ = prepared(activations="static")
    assert quantizer.observe([X] * 3) == Observed(6, 3)
    assert quantizer.observe([X] * 5, samples=3) == Observed(4, 2, more=True)
    quantizer.convert()
    report = quantizer.validate()
    assert report.observed == Observed(10, 5, more=True)
    summary = " ".join(report.summary().split())  # long lines are wrapped
    assert "observed: 10 samples in 5 batches, and data was left (samples=None runs all of it)" in summary
    assert json.loads(report.to_json())["observed"] == {"samples": 10, "batches": 5, "more": True}


@given(st.lists(st.builds(Observed, st.integers(1, 9), st.integers(1, 9), st.sampled_from([True, False, None]))))
def test_data_that_one_call_left_counts_as_left(calls):
    total = sum(calls, start=Observed(0, 0))
    left = [call.more for call in calls]
    assert total.more is (True if True in left else None if None in left else False)
    assert (total.samples, total.batches) == (sum(c.samples for c in calls), sum(c.batches for c in calls))


def test_without_data_the_report_has_nothing_observed():
    report = fewbits.quantize(mlp(), "int8").report
    assert report.observed is None
    assert report.to_dict()["observed"] is None
    assert "observed" not in report.summary()


@pytest.mark.parametrize("samples", [{}, {"samples": 150}, {"samples": 7}, {"samples": None}])
def test_the_report_of_quantize_says_how_much_data_was_run(samples):
    report = fewbits.quantize(mlp(), "int8", data=[torch.ones(1, 16)] * 200, **samples).report
    limit = samples.get("samples", 150)
    assert report.observed == Observed(limit or 200, limit or 200, more=limit is not None)


def test_one_sample_is_counted_in_plain_words():
    assert str(Observed(1, 1)) == "1 sample in 1 batch"
    assert (
        str(Observed(2, 1, more=None))
        == "2 samples in 1 batch, and perhaps data was left (samples=None runs all of it)"
    )


def test_a_layer_sees_more_than_150_rows_only_if_asked_to():
    rows = []
    for samples in ({}, {"samples": None}):
        seen = []
        quantizer, _ = prepared(observer=Watcher(seen.append))
        quantizer.observe([torch.ones(50, 16)] * 10, **samples)
        rows.append(sum(len(x) for x in seen if x.shape[1] == 16))
    assert rows == [150, 500]


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(7, 3), 7),
        (torch.tensor(1.0), 1),
        ((torch.ones(3, 2), torch.ones(5)), 3),
        ({"mask": None, "x": torch.ones(4, 2)}, 4),
        (UserDict(x=torch.ones(6, 2)), 6),
        ([{"deep": (1, torch.ones(2))}, torch.ones(5)], 2),
        ("text", 1),
        (["two", "texts"], 1),
        (None, 1),
        (torch.ones(0, 3), 0),
    ],
)
def test_samples_are_counted_along_the_first_axis_of_the_first_tensor(batch, samples):
    assert samples_in(batch) == samples
    assert run(nn.Identity(), [batch, X], forward=lambda m, b: None) == Observed(samples + 2, 2)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True, "all", math.inf])
def test_samples_that_cannot_be_counted_are_refused(samples):
    with pytest.raises(ArgumentError, match="samples must be an integer from 1 up, or None"):
        run(nn.Identity(), [X], samples=samples)


@pytest.mark.parametrize("batches", [X, torch.tensor(1.0), {"input": X}, {}, UserDict(input=X)])
def test_a_single_batch_instead_of_an_iterable_is_refused(batches):
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match=rf"a single {type(batches).__name__} is one batch.*\[batch\]"):
        quantizer.observe(batches)
    assert quantizer.state is State.PREPARED


@pytest.mark.parametrize("batches", [None, 5, object()])
def test_an_object_that_cannot_be_iterated_is_refused(batches):
    with pytest.raises(CalibrationError, match=f"such as a list or a DataLoader, not {type(batches).__name__}"):
        run(nn.Identity(), batches)


def test_an_object_that_can_only_be_indexed_is_iterated():
    class Rows:
        def __getitem__(self, index):
            return [X, X][index]

    assert run(nn.Identity(), Rows()) == Observed(4, 2)


def test_batches_are_freed():
    alive = []

    def batches():
        for _ in range(5):
            assert not any(reference() is not None for reference in alive[:-1])
            batch = torch.ones(2, 16)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    quantizer, _ = prepared(activations="static")
    quantizer.observe(batches())
    assert len(alive) == 5


# Progress reports.


def steps_of(batches, **options):
    steps = []
    run(nn.Identity(), batches, progress=steps.append, **options)
    return steps


class Sized:
    """A loader with a length."""

    def __init__(self, sizes):
        self._sizes = sizes

    def __len__(self):
        return len(self._sizes)

    def __iter__(self):
        return (torch.ones(size, 1) for size in self._sizes)


def test_progress_reports_every_batch_with_the_expected_number_of_samples():
    assert steps_of([torch.ones(20, 1)] * 3) == [
        Step("observe", "batch 1", 20, 60),
        Step("observe", "batch 2", 40, 60),
        Step("observe", "batch 3", 60, 60),
    ]
    assert [step.total for step in steps_of(Sized([20] * 9), samples=100)] == [100] * 5
    assert [step.total for step in steps_of(Sized([20] * 9), samples=90)] == [90] * 4 + [100]


def test_progress_without_a_length_has_no_total():
    steps = steps_of(torch.ones(20, 1) for _ in range(2))
    assert [(step.name, step.done, step.total) for step in steps] == [("batch 1", 20, 0), ("batch 2", 40, 0)]


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([30, 30, 40], [(30, 90), (60, 90), (100, 100)]),
        ([30, 30, 20], [(30, 90), (60, 90), (80, 90), (80, 80)]),
        ([60, 1], [(60, 120), (61, 120), (61, 61)]),
    ],
)
def test_a_wrong_total_is_corrected_at_the_end(sizes, told):
    assert [(step.done, step.total) for step in steps_of(Sized(sizes))] == told


# Batches that fail.


def test_a_batch_that_does_not_fit_the_model_is_named():
    quantizer, _ = prepared()
    with pytest.raises(CalibrationError, match=r"batch 2, of type Tensor, made .* RuntimeError: .*forward=") as caught:
        quantizer.observe([X, X[:, :3]])
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(CalibrationError, match=r"batch 1, of type dict, .* TypeError: .*keyword arguments.*forward="):
        quantizer.observe([{"no_such_argument": X}])
    assert quantizer.state is State.PREPARED


def test_an_error_of_the_user_s_forward_is_reported_as_such():
    with pytest.raises(
        CalibrationError, match=r"batch 1, of type Tensor.*KeyError: 'x'.*fed by your forward="
    ) as caught:
        run(nn.Identity(), [X], forward=lambda m, batch: {}["x"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interrupt_goes_through():
    def forward(model, batch):
        raise KeyboardInterrupt

    model = nn.Identity().train()
    with pytest.raises(KeyboardInterrupt):
        run(model, [X], forward=forward)
    assert model.training
    assert torch.is_grad_enabled()


def test_nan_in_an_input_is_refused_with_layer_and_batch():
    quantizer, _ = prepared(activations="static")
    bad = X.clone()
    bad[0, 0] = math.nan
    with pytest.raises(CalibrationError, match=r"batch 2: the layer of 0\.weight: .*\(2, 16\).* holds NaN or Inf"):
        quantizer.observe([X, bad])


# The inputs that observers get.


class Recorder(Watcher):
    """A `Watcher` that keeps the inputs it gets."""

    def __init__(self):
        self.seen = []
        super().__init__(self.seen.append)


def test_inputs_that_are_not_floating_or_empty_are_not_shown():
    layer, observer = nn.Identity(), Recorder()
    watch = InputWatch([("weight", layer, observer)])
    for x in (torch.arange(3), torch.empty(0, 4), torch.ones(2, dtype=torch.bool), "text"):
        layer(x)
    assert observer.seen == []
    assert watch.unseen() == ["weight"]
    layer(torch.ones(2))
    assert len(observer.seen) == 1
    assert watch.unseen() == []
    watch.remove()
    layer(torch.ones(2))
    assert len(observer.seen) == 1


def test_the_first_tensor_among_the_arguments_is_shown():
    class Several(nn.Module):
        def forward(self, flag, x, mask=None):
            return x

    layer, observer = Several(), Recorder()
    InputWatch([("weight", layer, observer)])
    layer(None, X, mask=torch.zeros(1))
    layer(None, x=X, mask=torch.zeros(1))
    assert all(x is not X and torch.equal(x, X) for x in observer.seen)
    assert len(observer.seen) == 2


def test_static_scales_come_from_the_observed_inputs():
    scales = []
    for factor in (1, 3):
        quantizer, _ = prepared(activations="static")
        quantizer.observe([X * factor])
        scales.append(quantizer.convert()[0].weight_stored.input_scale)
    assert scales[0].item() == pytest.approx(X.max().item() / 127)
    assert scales[1].item() == pytest.approx(3 * X.max().item() / 127)


def test_a_tokenizer_s_batches_are_fed_as_keyword_arguments():
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 16)
            self.linear = nn.Linear(16, 8)

        def forward(self, input_ids, attention_mask):
            return self.linear(self.embedding(input_ids) * attention_mask.unsqueeze(-1))

    recorder = []
    quantizer, _ = prepared(Model(), observer=Watcher(recorder.append))
    batch = transformers.BatchEncoding(
        {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    )
    assert samples_in(batch) == 2
    quantizer.observe([batch, batch])
    assert [tuple(x.shape) for x in recorder] == [(2, 3, 16)] * 2


def test_a_loader_of_pairs_counts_its_samples():
    dataset = torch.utils.data.TensorDataset(torch.rand(60, 16), torch.arange(60))
    loader, steps = torch.utils.data.DataLoader(dataset, batch_size=25), []
    assert run(mlp(), loader, progress=steps.append) == Observed(60, 3)
    assert [(step.done, step.total) for step in steps] == [(25, 75), (50, 75), (60, 75), (60, 60)]


@pytest.mark.slow
def test_a_sentence_transformer_is_calibrated_with_the_features_that_its_tokenizer_returns():
    library = pytest.importorskip("sentence_transformers")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.dense = nn.Embedding(10, 16), nn.Linear(16, 16)

        def forward(self, features):
            return features | {"token_embeddings": self.dense(self.embedding(features["input_ids"]))}

    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model = library.SentenceTransformer(modules=[Tokens(), modules.Pooling(16)], device="cpu")
    features = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    result = fewbits.quantize(model, "int8", activations="static", data=[features], min_elements=1)
    assert result.report.observed == Observed(2, 1)
    assert result.model(features)["sentence_embedding"].shape == (2, 16)
