"""Metrics that compare the outputs of a quantized model with those of the float model, and `ModelReport`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.calibration.batches import Observed
from fewbits.errors import ArgumentError
from fewbits.numerics.metrics import sqnr_db
from fewbits.selection.nearest import checked_name
from fewbits.validation.tensors import finite

#: The target of a position that has none, as in torch's losses.
NO_TARGET = -100

#: Elements of an output that are compared at a time, in float64.
_ELEMENTS = 1 << 20


@attrs.frozen(eq=False)
class Metric:
    """A figure for how two outputs differ, made from sums over positions.

    A position is a row of the outputs' last axis, such as the logits of one token.

    Attributes:
        name: the key of the metric.
        title: its name in texts.
        unit: the format of a figure, and its unit.
        rising: whether more is better.
        sums: takes rows of the float output and of the quantized output, float64, (positions, classes), and the targets
            of these positions; returns two sums.
        figure: makes the figure from the two sums.
        of_logits: whether the outputs must be logits.
    """

    name: str
    title: str
    unit: str
    rising: bool
    sums: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    figure: Callable[[float, float], float]
    of_logits: bool = False

    def in_words(self, figure: float) -> str:
        """Name a figure, with its unit."""
        return f"{self.title} {self.unit.format(figure)}"


def _counted(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(), torch.tensor(float(len(values)))


def _kl(reference: Tensor, output: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    expected = reference.log_softmax(1)
    divergence = (expected.exp() * (expected - output.log_softmax(1))).sum(1)
    return _counted(divergence.clamp(min=0))  # rounding may give less than 0; NaN stays


def _top1(reference: Tensor, output: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    agrees = (reference.argmax(1) == output.argmax(1)).double()
    return _counted(agrees.masked_fill(output.isnan().any(1), math.nan))


def _cosine(reference: Tensor, output: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    norms = reference.norm(dim=1) * output.norm(dim=1)
    cosine = ((reference * output).sum(1) / norms).clamp(-1, 1)
    equal = (reference == output).all(1).double()
    return _counted(torch.where(norms == 0, equal, cosine))


def _powers(reference: Tensor, output: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return reference.square().sum(), (reference - output).square().sum()


def _likelihood(_: Tensor, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    known = targets != NO_TARGET
    chosen = output[known].log_softmax(1).gather(1, targets[known].unsqueeze(1))
    return _counted(-chosen.squeeze(1))


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _exp_of_mean(total: float, count: float) -> float:
    mean = _mean(total, count)
    return math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf


#: All metrics, by name.
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("kl", "KL", "{:.4g} nats", False, _kl, _mean, of_logits=True),
        Metric("top1", "top-1 agreement", "{:.2%}", True, _top1, _mean, of_logits=True),
        Metric("cosine", "cosine", "{:.6f}", True, _cosine, _mean),
        Metric("sqnr", "SQNR", "{:.2f} dB", True, _powers, sqnr_db),
        Metric("perplexity", "perplexity", "{:.4g}", False, _likelihood, _exp_of_mean, of_logits=True),
    )
}

#: The perplexity of the float model itself; it goes with "perplexity".
_OF_FLOAT = attrs.evolve(
    METRICS["perplexity"], name="float_perplexity", sums=lambda own, _, targets: _likelihood(own, own, targets)
)


@attrs.frozen
class ModelReport:
    """How the outputs of a quantized model compare with those of the float model.

    Attributes:
        samples: the number of samples.
        batches: the number of batches.
        positions: the number of rows of the outputs' last axis; those that an attention mask excludes do not count.
        broken: the number of batches in which the quantized model gave NaN or Inf.
        figures: the metrics, by name: "kl" (mean over positions, in nats), "top1" (a share), "cosine" (mean over
            positions), "sqnr" (in dB), "perplexity"; and "float_perplexity" beside the latter.
        worst: the figures of the batch where each is worst.
    """

    samples: int
    batches: int
    positions: int
    broken: int
    figures: Mapping[str, float]
    worst: Mapping[str, float]

    def failures(self, limits: Mapping[str, float]) -> Iterator[str]:
        """Yield a sentence for each metric beyond its limit, and for outputs that are not finite."""
        if self.broken:
            yield f"the quantized model gives NaN or Inf in {self.broken} of {self.batches} batches"
        for name, limit in limits.items():
            metric, figure = METRICS[name], self.figures[name]
            if not (figure >= limit if metric.rising else figure <= limit):
                side = "below" if metric.rising else "above"
                yield f"{metric.in_words(figure)} of the model is {side} {metric.unit.format(limit)}"

    def lines(self) -> Iterator[str]:
        """Yield lines for a summary."""
        over = f"over {self.positions:,} positions in {self.batches} batches"
        yield f"model: {', '.join(self._in_words(self.figures))}, {over}"
        if self.batches > 1:
            yield f"worst batch: {', '.join(self._in_words(self.worst))}"

    def _in_words(self, figures: Mapping[str, float]) -> Iterator[str]:
        for name, metric in METRICS.items():
            if name in figures:
                own = figures.get(f"float_{name}")
                beside = "" if own is None else f" (float model {metric.unit.format(own)})"
                yield metric.in_words(figures[name]) + beside

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON; a figure that is not finite is null."""
        counts = {"samples": self.samples, "batches": self.batches, "positions": self.positions, "broken": self.broken}
        worst = {f"worst_{name}": finite(figure) for name, figure in self.worst.items()}
        return {**counts, **{name: finite(figure) for name, figure in self.figures.items()}, **worst}


class OutputComparison:
    """Adds up metrics over batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._worst: dict[str, float] = {}
        self._positions = self._broken = 0

    def add(self, metrics: Collection[str], reference: Tensor, output: Tensor, targets: Tensor) -> None:
        """Compare the outputs of one batch.

        Args:
            metrics: the names of the metrics.
            reference: of the float model, finite, (positions, classes).
            output: of the quantized model, of the same shape.
            targets: the class that each position should give, or `NO_TARGET`.
        """
        self._positions += len(reference)
        self._broken += not bool(output.isfinite().all())
        chosen = [metric for metric in METRICS.values() if metric.name in metrics]
        if "perplexity" in metrics:
            chosen.append(_OF_FLOAT)
        sums = dict.fromkeys([metric.name for metric in chosen], (0.0, 0.0))
        step = max(1, _ELEMENTS // max(1, reference.shape[1]))
        for start in range(0, len(reference), step):
            rows = slice(start, start + step)
            own, other, wanted = reference[rows].double(), output[rows].double(), targets[rows]
            for metric in chosen:
                sums[metric.name] = _added(sums[metric.name], metric.sums(own, other, wanted))
        for metric in chosen:
            self._sums[metric.name] = _added(self._sums.get(metric.name, (0.0, 0.0)), sums[metric.name])
            if any(sums[metric.name]):  # an output of zeros, or no position, has no figure of its own
                self._note(metric, metric.figure(*sums[metric.name]))

    def _note(self, metric: Metric, figure: float) -> None:
        worst = self._worst.get(metric.name, figure)
        both = (worst, figure)
        not_known = any(map(math.isnan, both))
        self._worst[metric.name] = math.nan if not_known else min(both) if metric.rising else max(both)

    def report(self, observed: Observed) -> ModelReport:
        """Return the figures of all batches.

        Args:
            observed: how many samples and batches there were.
        """
        known = [metric for metric in (*METRICS.values(), _OF_FLOAT) if metric.name in self._sums]
        figures = {metric.name: metric.figure(*self._sums[metric.name]) for metric in known}
        return ModelReport(
            observed.samples, observed.batches, self._positions, self._broken, figures=figures, worst=self._worst
        )


def _added(sums: tuple[float, float], more: tuple[Tensor | float, Tensor | float]) -> tuple[float, float]:
    return sums[0] + float(more[0]), sums[1] + float(more[1])


def check_metrics(metrics: object) -> None:
    """Refuse anything but a list of known metrics, at least one.

    Raises:
        ArgumentError: naming the metrics.
    """
    if isinstance(metrics, str) or not isinstance(metrics, Collection) or not metrics:
        raise ArgumentError(f"metrics must be a list of names, such as ['kl', 'top1'], not {metrics!r}")
    for name in metrics:
        checked_name("metric", name, METRICS)


def check_limits(limits: object) -> None:
    """Refuse anything but a mapping from known metrics to numbers.

    Raises:
        ArgumentError: naming the metrics.
    """
    if not isinstance(limits, Mapping):
        raise ArgumentError(f"limits must be a mapping, such as {{'kl': 0.1, 'top1': 0.9}}, not {limits!r}")
    for name, limit in limits.items():
        checked_name("metric", name, METRICS)
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or math.isnan(limit):
            raise ArgumentError(f"the limit of {name} must be a number, not {limit!r}")
