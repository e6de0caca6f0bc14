"""`allocate`: choose a scheme for every tensor, so that the error is least under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fewbits._events import emit
from fewbits.calibration.batches import SAMPLES
from fewbits.calibration.curvature import Curvatures, curvatures, filled
from fewbits.calibration.running import Forward
from fewbits.config.config import QuantizationConfig
from fewbits.errors import ArgumentError
from fewbits.numerics.layout import Layout
from fewbits.planning.allocation import Allocation
from fewbits.planning.budget import Budget
from fewbits.planning.candidates import CandidateRule, Ledgers, parsed_candidates
from fewbits.planning.choosing import Choice, Options
from fewbits.planning.scoring import Scorer
from fewbits.selection.progress import Progress, followed, no_progress
from fewbits.sources.base import Source
from fewbits.sources.matching import matched_parameters
from fewbits.sources.open import open_source

#: The meaning of the errors, by the divergence that the data predicts; None: without data.
_LABELS = {
    None: "mean relative squared error of weights",
    "kl": "predicted KL in nats per position",
    "mse": "predicted squared error of outputs, relative",
}


def allocate(
    source: object,
    *,
    bits_per_weight: float | None = None,
    target_size: int | str | None = None,
    max_kl: float | None = None,
    min_sqnr: float | None = None,
    candidates: Iterable[CandidateRule] | None = None,
    together: Sequence[Sequence[str]] | None = None,
    config: QuantizationConfig | None = None,
    entry: str | None = None,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Allocation:
    """Choose a scheme for every tensor, embeddings and output layers included, so that the error is least.

    Every candidate rounds every weight once. Without data, the error is the mean over all elements of the relative
    squared errors of their tensors. With data, it is the divergence of the model's outputs that these errors cause, to
    second order; see `fewbits.calibration.curvature`. The choice is a multiple-choice knapsack problem, solved with a
    proved gap. The same call gives the same result.

    Args:
        source: an `nn.Module`, a state dict, or the path of a checkpoint. It is not changed.
        bits_per_weight: the budget as bits of all tensors over the number of all elements. Give one budget.
        target_size: the budget as bytes of all tensors, such as ``"2GB"``.
        max_kl: the budget as predicted KL divergence in nats for each position; the result is as small as possible. It
            needs data, and a model with logits.
        min_sqnr: the least SQNR of every weight in dB; alone, or beside a budget.
        candidates: the schemes to choose from: names such as ``"nf4"``, tables such as
            ``{"scheme": "int4", "group_size": 64}``, or ``"keep"``. None takes six, from 2 to 8 bits, and
            ``"keep"``.
        together: layers that get the same scheme, as lists of parts of names. None ties query, key and value, and gate
            and up, because servers join them; an empty list ties nothing. Tied tensors are one tensor.
        config: other settings: rules that keep tensors or fix their schemes, an observer, a rounding strategy, the
            dtype of scales. None stores scales in float16.
        entry: the entry of the source; see `fewbits.quantize`.
        model: with a path, a model with its weights, to run the data.
        data: batches, as for `Quantizer.observe`; one forward and one backward pass each.
        forward: runs one batch, and returns the output.
        samples: take this many samples of the data; None takes all of it.
        progress: called before and after every tensor, and after every batch.

    Raises:
        ArgumentError: for arguments that are not allowed or contradict each other, or a budget that cannot be met.
        SelectionError: for a malformed rule, or one that fits no tensor.
        CalibrationError: if the data cannot be run.
        FewbitsError: as `Quantizer.prepare`.

    >>> model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    >>> allocate(model, bits_per_weight=4.5).bits_per_weight <= 4.5
    True
    """
    budget = Budget(bits_per_weight=bits_per_weight, target_size=target_size, max_kl=max_kl, min_sqnr=min_sqnr)
    _check(budget, config, data)
    opened = open_source(source, entry=entry)
    settings = QuantizationConfig(scale_dtype="float16") if config is None else config
    ledgers = Ledgers.of(source, entry, opened, settings, parsed_candidates(candidates))
    options = Options.of(ledgers, together)
    found = None
    if data is not None:
        found = _measured(opened, options, model, data, forward=forward, samples=samples, progress=progress)
        if max_kl is not None and found.divergence != "kl":
            raise ArgumentError("max_kl needs a model whose output has logits; this one has none")
    scorer = Scorer(opened, ledgers.base.quantizer(), None if found is None else found.of_weights, options.choosable)
    scores = {row.name: scorer.scores(options.rows[row.name]) for row in followed("score", options.firsts, progress)}
    label = _LABELS[None if found is None else found.divergence]
    return Choice(source, entry, ledgers, options, scores).within(budget, label)


def _check(budget: Budget, config: object, data: object) -> None:
    if config is not None and not isinstance(config, QuantizationConfig):
        raise ArgumentError(f"config must be a QuantizationConfig, not {config!r}")
    if budget.max_kl is not None and data is None:
        raise ArgumentError("max_kl needs data: batches on which the divergence is predicted")


def _measured(source: Source, options: Options, model: nn.Module | None, data: Iterable[Any], **run: Any) -> Curvatures:
    """Measure the curvature of all weights that have a choice, and say which ones the outputs do not depend on."""
    running = source.module() if model is None else model
    if running is None:
        raise ArgumentError("data needs a model: a state dict or a file has no forward; pass model= with a file")
    layouts = {row.name: row.layout or Layout.of(row.shape) for row in options.firsts}
    names = {name: name for name in layouts}
    if model is not None:
        names = matched_parameters(model, layouts, source.read)
    found = curvatures(running, {names[name]: layout for name, layout in layouts.items()}, data, **run)
    of_weights = {name: found.of_weights[names[name]] for name in layouts}
    unused = [name for name, curvature in of_weights.items() if curvature.is_zero]
    if unused:
        emit("warning", "weights_without_gradient", tensors=len(unused), first=unused[0])
    return Curvatures(filled(of_weights, unused), found.divergence)
