"""`tune`: change the scales of a quantized model, so that its outputs come closer to those of the float model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import attrs
import torch
from torch import nn

from fewbits._events import emit
from fewbits.calibration.batches import SAMPLES, length_of, taken
from fewbits.calibration.changes import freed, write
from fewbits.calibration.descent import Check, Comparison, Descent, Numbered
from fewbits.calibration.factors import standing_in
from fewbits.calibration.losses import Loss, check_loss
from fewbits.calibration.recomputing import checkpointed
from fewbits.calibration.replay import without_shortcuts
from fewbits.calibration.running import Forward, evaluating
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.nn.packed import PackedWeight
from fewbits.nn.stored import stored_weights
from fewbits.nn.walk import slots
from fewbits.numerics.spec import QuantSpec
from fewbits.selection.progress import Progress, no_progress

#: The kinds of tensors that can be tuned.
TUNABLE = ("scales", "biases", "norms")

#: The default size of a step.
LEARNING_RATE = 1e-3

#: Without held-out data, one of this many batches is held out.
_HELD_OUT = 8


def _is_count(_: Any, attribute: attrs.Attribute[int], value: object) -> None:
    if type(value) is not int or value < 1:
        raise ArgumentError(f"{attribute.name} must be an integer from 1 up, not {value!r}")


def _is_rate(_: Any, attribute: attrs.Attribute[float], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ArgumentError(f"{attribute.name} must be a number above 0, at most 1, not {value!r}")


def _is_what(_: Any, attribute: attrs.Attribute[Sequence[str]], value: object) -> None:
    known = not isinstance(value, str) and isinstance(value, Sequence) and all(part in TUNABLE for part in value)
    if not known or not value:
        names = ", ".join(map(repr, TUNABLE))
        raise ArgumentError(f"{attribute.name} must be a list of some of {names}, such as ['scales'], not {value!r}")


@attrs.frozen(kw_only=True)
class Tuning:
    """Settings of `fewbits.tune`, for ``quantize(..., tune=Tuning(...))``.

    Args:
        epochs: how often each batch is trained on.
        loss: ``"kl"``, the KL divergence of the distributions that logits give; ``"mse"``, the mean square of the
            difference; ``"cosine"``, one minus the cosine of vectors; or a function of the output and the reference's
            output that returns a tensor of one element. None means "kl" for an output with ``logits``, else "mse".
        held_out: batches to measure on; the state with the least loss is kept. Batches of another kind than the data
            are best. None holds out one batch in eight of the data, at least one.
        what: ``"scales"``; ``"biases"`` of modules with quantized weights; ``"norms"``, the parameters of modules whose
            class has "norm" in its name.
        learning_rate: the size of the first step, in logarithms of scales; later steps fall to zero along a cosine.

    Raises:
        ArgumentError: for another value.
    """

    epochs: int = attrs.field(default=1, validator=_is_count)
    loss: Loss | None = attrs.field(default=None, validator=lambda _, __, loss: check_loss(loss))
    held_out: Iterable[Any] | None = attrs.field(default=None, repr=False)
    what: Sequence[str] = attrs.field(default=("scales",), validator=_is_what)
    learning_rate: float = attrs.field(default=LEARNING_RATE, validator=_is_rate)

    @classmethod
    def of(cls, tune: int | Tuning) -> Tuning:
        """Return the given settings, or make settings from a number of epochs.

        Raises:
            ArgumentError: for anything else.
        """
        if isinstance(tune, Tuning):
            return tune
        if type(tune) is not int or tune < 1:
            raise ArgumentError(f"tune must be a number of epochs from 1 up, or a Tuning, not {tune!r}")
        return cls(epochs=tune)


@attrs.frozen
class Tuned:
    """The result of `tune`.

    Attributes:
        loss: the name of the loss.
        before: the loss on the held-out batches before tuning.
        after: the loss on the held-out batches with the state that was kept; never more than `before`.
        steps: how many batches the model was trained on.
        best_step: the step after which the loss was least; 0 if nothing was changed.
        tensors: how many tensors were changed.
        checks: all measurements.
    """

    loss: str
    before: float
    after: float
    steps: int
    best_step: int
    tensors: int
    checks: tuple[Check, ...] = attrs.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a description for JSON."""
        return attrs.asdict(self)

    @property
    def changed(self) -> bool:
        """Whether the model was changed."""
        return self.tensors > 0


def tune(
    quantized: nn.Module,
    reference: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    epochs: int = 1,
    loss: Loss | None = None,
    held_out: Iterable[Any] | None = None,
    what: Sequence[str] = ("scales",),
    learning_rate: float = LEARNING_RATE,
    samples: int | None = SAMPLES,
    progress: Progress = no_progress,
) -> Tuned:
    """Tune the scales of a quantized model in place, so that its outputs come closer to those of the float model.

    The codes stay as they are. In the first half of the steps each row of a weight gets one factor, in the second half
    each scale gets one. The model keeps the state with the least loss on held-out batches, measured with the scales as
    they are stored; that may be the state before. After an error or an interruption the model is as it was before.

    The same call gives the same result on the same machine with the same number of threads.

    Args:
        quantized: a model with quantized layers.
        reference: the float model that it was made from; it is not changed.
        data: batches, as for `Quantizer.observe`. They are kept in memory.
        forward: runs one batch, ``forward(model, batch)``, and returns the output.
        epochs: how often each batch is trained on; see `fewbits.extend.Tuning`, also for the next four.
        loss: the loss to reduce.
        held_out: the batches to measure on.
        what: the kinds of tensors to tune.
        learning_rate: the size of the first step.
        samples: take this many samples of the data; None takes all of it.
        progress: called after every batch.

    Raises:
        ArgumentError: for a value that is not allowed, or a model without quantized weights.
        CalibrationError: if there is too little data, a model cannot run it, or the outputs cannot be compared.
        NonFiniteError: if the loss becomes NaN or Inf.
    """
    settings = Tuning(epochs=epochs, loss=loss, held_out=held_out, what=what, learning_rate=learning_rate)
    _check_models(quantized, reference)
    trained, measured = _divided(taken(data, samples), None if held_out is None else taken(held_out, samples))
    scales = "scales" in settings.what
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiler cannot trace the stand-ins
        for model in (reference, quantized):
            stack.enter_context(evaluating(model))
            stack.enter_context(without_shortcuts(model))
        weights = stack.enter_context(standing_in(quantized, tuned=scales))
        parameters = stack.enter_context(freed(quantized, _chosen(quantized, settings.what)))
        comparison = Comparison(quantized, reference, forward, settings.loss)
        descent = Descent(comparison, weights if scales else [], parameters, measured)
        stack.enter_context(checkpointed(quantized, partial(comparison.run, quantized, measured[0])))
        descent.run(trained, epochs, learning_rate, progress)
        changes = descent.changes()
    write(quantized, changes)
    tuned = Tuned(
        loss=comparison.name,
        before=descent.checks[0].held_out,
        after=descent.best.held_out,
        steps=descent.checks[-1].step,
        best_step=descent.best.step,
        tensors=len(changes),
        checks=tuple(descent.checks),
    )
    emit("info" if tuned.changed else "warning", "tuned", **tuned.to_dict())
    return tuned


def _check_models(quantized: object, reference: object) -> None:
    """Refuse anything but a quantized model and its float model, and inference mode, which records no gradients.

    Raises:
        ArgumentError: naming the way out.
    """
    if torch.is_inference_mode_enabled():
        raise ArgumentError("tune needs gradients; call it outside of torch.inference_mode()")
    if not isinstance(quantized, nn.Module) or not isinstance(reference, nn.Module):
        raise ArgumentError(
            "tune takes two models, the quantized one and the float one, not a "
            f"{type(quantized).__name__} and a {type(reference).__name__}"
        )
    if quantized is reference:
        raise ArgumentError("tune needs the float model too, and got the quantized model twice")
    if not any(isinstance(module, PackedWeight) for module in quantized.modules()):
        raise ArgumentError(
            f"no weight of this {type(quantized).__name__} has codes; pass the quantized model first, then the float "
            "model"
        )


def check_divisible(data: object) -> None:
    """Refuse a single batch: tuning trains on some batches, and holds out others.

    Raises:
        CalibrationError: if the data has one batch.
    """
    if length_of(data) == 1:
        raise CalibrationError(
            "the data has one batch, and tuning needs batches to train on and others to measure on: pass smaller "
            "batches, or held_out="
        )


def _divided(data: list[Any], held_out: list[Any] | None) -> tuple[list[Numbered], list[Numbered]]:
    """Return the batches to train on, and those to measure on."""
    numbered = list(enumerate(data, 1))
    if held_out is not None:
        return numbered, list(enumerate(held_out, 1))
    check_divisible(data)
    # Every eighth batch, counted back from the last.
    first = len(numbered) % _HELD_OUT or _HELD_OUT
    measured = numbered[first - 1 :: _HELD_OUT]
    numbers = {number for number, _ in measured}
    return [batch for batch in numbered if batch[0] not in numbers], measured


def _chosen(model: nn.Module, what: Collection[str]) -> list[nn.Parameter]:
    """List the parameters to tune; a shared parameter once."""
    found: dict[nn.Parameter, None] = {}
    for slot in slots(model):
        tensor = slot.tensor
        holds_codes = any(isinstance(stored.spec, QuantSpec) for stored in stored_weights(slot.module).values())
        is_bias = "biases" in what and holds_codes and "bias" in slot.local
        is_norm = "norms" in what and "norm" in type(slot.module).__name__.lower()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and (is_bias or is_norm):
            found[tensor] = None
    return list(found)
