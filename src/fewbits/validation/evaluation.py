"""Run a float model and its quantized form side by side on data, and compare their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from types import EllipsisType
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.calibration.batches import Batches
from fewbits.calibration.outputs import counted, floating, named
from fewbits.calibration.replay import without_shortcuts
from fewbits.calibration.running import Forward, evaluating, run_one
from fewbits.errors import CalibrationError
from fewbits.numerics.dtypes import dtype_name
from fewbits.selection.progress import Progress, no_progress
from fewbits.validation.outputs import (
    METRICS,
    NO_TARGET,
    ModelReport,
    OutputComparison,
    check_limits,
    check_metrics,
)

#: Outputs to look for in a model's result, by attribute or key, the most telling first.
_NAMES = ("logits", "sentence_embedding", "last_hidden_state")


@attrs.frozen(eq=False)
class Evaluation:
    """A comparison of the outputs of the float model and of the quantized model.

    Attributes:
        data: the batches.
        forward: runs one batch, ``forward(model, batch)``; None feeds it as `observe` does.
        metrics: the names of the metrics; None chooses by the output: "kl" and "top1" for logits, otherwise "cosine"
            and "sqnr".
        limits: the worst figure that passes, by metric: the most for "kl" and "perplexity", the least for the others.

    Raises:
        ArgumentError: for an unknown metric, or a limit that is not a number.
    """

    data: Iterable[Any]
    forward: Forward | None = None
    metrics: Sequence[str] | None = None
    limits: Mapping[str, float] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.metrics is not None:
            check_metrics(self.metrics)
        check_limits(self.limits)

    def tried(self, reference: nn.Module) -> Evaluation:
        """Run the float model on the first batch, before the work on a quantized model begins.

        Args:
            reference: the float model.

        Returns:
            an evaluation that still has the first batch, although an iterator gives it once.

        Raises:
            CalibrationError: if there is no batch, or the first one cannot be run or compared.
        """
        first = [batch for _, batch in islice(Batches(self.data), 1)]
        attrs.evolve(self, data=first).run(reference, reference)
        return attrs.evolve(self, data=chain(first, self.data)) if isinstance(self.data, Iterator) else self

    def run(
        self,
        reference: nn.Module,
        model: nn.Module,
        *,
        watching: Callable[[], AbstractContextManager[object]] = nullcontext,
        progress: Progress = no_progress,
    ) -> ModelReport:
        """Run all batches through both models, in eval mode and without gradients. Only one batch is in memory.

        Args:
            reference: the float model.
            model: the quantized model.
            watching: makes the context in which the float model runs a batch.
            progress: called after every batch.

        Raises:
            CalibrationError: if there is no batch, a batch cannot be run, or its outputs cannot be compared.
        """
        batches = Batches(self.data, activity="compare", progress=progress)
        comparison = OutputComparison()
        with without_shortcuts(reference), without_shortcuts(model), evaluating(reference), evaluating(model):
            for number, batch in batches:
                with watching():
                    wanted = self._output(reference, batch, number)
                found = self._output(model, batch, number)
                try:
                    self._add(comparison, batch, wanted[0], *_pair(wanted[1], found[1]))
                except CalibrationError as error:
                    raise CalibrationError(f"batch {number}: {error}") from None
        return comparison.report(batches.observed())

    def _output(self, model: nn.Module, batch: Any, number: int) -> tuple[str, Tensor]:
        """Run a batch, and return the name and the tensor of the output.

        The tensor is taken at once: a model may return the batch itself, into which the other model writes.
        """
        result = run_one(model, batch, number, self.forward)
        try:
            return _output(result)
        except CalibrationError as error:
            raise CalibrationError(f"batch {number}: {error}") from None

    def _chosen(self, name: str) -> list[str]:
        """Return the names of the metrics for an output of this name."""
        chosen = self.metrics
        if chosen is None:
            chosen = ("kl", "top1") if name == "logits" else ("cosine", "sqnr")
        return [*chosen, *self.limits]

    def _add(self, comparison: OutputComparison, batch: Any, name: str, own: Tensor, other: Tensor) -> None:
        wanted = [metric for metric in self._chosen(name) if METRICS[metric].of_logits]
        if wanted and (name not in ("", "logits") or own.dim() == 0 or own.shape[-1] < 2):
            raise CalibrationError(
                f"{', '.join(wanted)} compare logits, and the model gives {name or 'a tensor'} of shape "
                f"{tuple(own.shape)}; pass forward=, a function of the model and the batch that returns logits, or "
                "other metrics"
            )
        where = counted(batch, own)
        targets = _targets(batch, own, where) if "perplexity" in wanted else torch.full(own.shape[:-1], NO_TARGET)
        own, other = (x[where].reshape(-1, x.shape[-1] if x.dim() else 1) for x in (own, other))
        comparison.add(self._chosen(name), own, other, targets.to(own.device)[where].flatten())


def checked_model(model: object, *, inplace: bool) -> nn.Module:
    """Return a model whose outputs can be compared with those of the float model.

    Args:
        model: perhaps a model.
        inplace: whether its weights are, or will be, quantized in place.

    Raises:
        CalibrationError: if it is no model, or there will be no float model.
    """
    elsewhere = "fewbits.extend.compare_outputs(float_model, quantized_model, data) compares any two models"
    if not isinstance(model, nn.Module):
        raise CalibrationError(
            "a state dict or a file has no forward whose outputs could be compared; quantize the model itself, or pass "
            f"the model of a file (model=), or load the result into a model: {elsewhere}"
        )
    if inplace:
        raise CalibrationError(
            f"inplace=True leaves no float model to compare outputs with; keep a float copy: {elsewhere}; or quantize "
            "without inplace"
        )
    return model


def compare_outputs(
    reference: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    metrics: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> ModelReport:
    """Compare the outputs of two models, such as a float model and its quantized form.

    Args:
        reference: the float model.
        model: the quantized model, or any other.
        data: the batches; all of them are run.
        forward: runs one batch, ``forward(model, batch)``, and returns its output; None feeds it as `observe` does.
        metrics: the names of the metrics, as in `Quantizer.validate`.
        progress: called after every batch.

    Raises:
        ArgumentError: for an unknown metric.
        CalibrationError: if a batch cannot be run, or its outputs cannot be compared.
    """
    return Evaluation(data, forward, metrics).run(reference, model, progress=progress)


def _pair(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of the float and the quantized model, as far as they can be compared."""
    if own.shape != other.shape:
        raise CalibrationError(
            f"the float model gives an output of shape {tuple(own.shape)}, the quantized model one of shape "
            f"{tuple(other.shape)}; they cannot be compared"
        )
    if not bool(own.isfinite().all()):
        raise CalibrationError("the output of the float model holds NaN or Inf; there is nothing to compare with")
    return own.detach(), other.detach().to(own.device)


def _output(result: object) -> tuple[str, Tensor]:
    """Find the output to compare in the result of a forward, and its name, "" for a plain tensor."""
    if isinstance(result, Tensor):
        return "", _floating(result, "its output")
    for name in _NAMES:
        if (value := named(result, name)) is not None:
            return name, _floating(value, name)
    tensor = next(floating(result), None)
    if tensor is None:
        raise CalibrationError(
            f"the model gives a {type(result).__name__} without a floating tensor; pass forward=, a function of the "
            "model and the batch that returns the tensor to compare"
        )
    return "the first tensor", tensor


def _floating(tensor: Tensor, what: str) -> Tensor:
    if not tensor.is_floating_point():
        raise CalibrationError(
            f"{what} is {dtype_name(tensor.dtype)}, and only floating outputs are compared; pass forward=, a function "
            "of the model and the batch that returns logits or other floats"
        )
    return tensor


def _targets(batch: Any, output: Tensor, where: Tensor | EllipsisType) -> Tensor:
    """Return the next token at each position, or `NO_TARGET` if it does not count or does not exist."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else batch if isinstance(batch, Mapping) else {}
    labels, places = given.get("labels", given.get("input_ids")), output.shape[:-1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != places or not places:
        raise CalibrationError(
            "perplexity needs the next token of each position: a batch of token ids, or a mapping with input_ids or "
            f"labels, of the shape of the logits without their last axis, {tuple(places)}"
        )
    tokens = torch.full(places, NO_TARGET, device=output.device)
    tokens[where] = labels.to(tokens)[where]
    return F.pad(tokens[..., 1:], (0, 1), value=NO_TARGET)
