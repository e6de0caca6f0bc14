"""Losses: how far the output of a quantized model is from the output of the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.outputs import counted, floating, named
from fewbits.errors import ArgumentError, CalibrationError

#: The name of a loss, or a function ``loss(output, reference_output)`` that returns a tensor of one element.
Loss = str | Callable[[Any, Any], Tensor]

#: Compares one tensor of the output with the same tensor of the reference.
_Compare = Callable[[Tensor, Tensor], Tensor]

#: Positions whose logits are compared at a time: log-probabilities take several times the memory of logits.
_POSITIONS = 64


def _kl(output: Tensor, reference: Tensor) -> Tensor:
    """The mean over positions of the KL divergence of the distributions over the last axis."""
    rows, references = output.reshape(-1, output.shape[-1]), reference.reshape(-1, reference.shape[-1])
    summed: Tensor = _SummedKL.apply(rows, references)  # type: ignore[no-untyped-call]
    return summed / len(rows)


class _SummedKL(torch.autograd.Function):
    """The sum over rows of logits of ``KL(reference || output)``.

    Its gradient is the difference of the probabilities. The forward pass computes it at once, a few rows at a time:
    logits of a language model are large, and nothing else of their size is kept.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, reference: Tensor) -> Tensor:
        gradient = torch.empty_like(output) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=output.device)
        for start in range(0, len(output), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            expected = reference[rows].float().log_softmax(-1)
            found = output[rows].float().log_softmax(-1)
            probabilities = expected.exp()
            total += expected.sub_(found).mul_(probabilities).sum()
            if gradient is not None:
                gradient[rows] = found.exp_().sub_(probabilities)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None


def _mse(output: Tensor, reference: Tensor) -> Tensor:
    """The mean square of the difference, as a share of the mean square of the reference."""
    signal = reference.float().square().mean()
    return (output.float() - reference.float()).square().mean() / signal.clamp(min=torch.finfo(torch.float32).tiny)


def _cosine(output: Tensor, reference: Tensor) -> Tensor:
    """One minus the mean cosine between vectors along the last axis."""
    if not output.dim():
        return _mse(output, reference)
    return 1 - torch.cosine_similarity(output.float(), reference.float(), -1).mean()


_COMPARED: Mapping[str, _Compare] = {"kl": _kl, "mse": _mse, "cosine": _cosine}

#: The names of the losses.
LOSSES = tuple(_COMPARED)


def check_loss(loss: Loss | None) -> None:
    """Refuse a loss that is neither a name nor a function.

    Raises:
        ArgumentError: with all names.
    """
    if loss is not None and not callable(loss) and loss not in LOSSES:
        names = ", ".join(map(repr, LOSSES))
        raise ArgumentError(f"loss must be {names}, or a function of output and reference output, not {loss!r}")


def default_loss(output: Any) -> str:
    """Choose a loss by an output of the float model: "kl" if it has logits, otherwise "mse"."""
    return "mse" if _logits(output) is None else "kl"


def loss_of(loss: Loss, output: Any, reference: Any, batch: Any) -> Tensor:
    """Compare the outputs of two models for one batch.

    Args:
        loss: a name or a function. "kl" compares logits, or else the first tensor of the output. "mse" and "cosine"
            compare all floating tensors of the output, and give their mean.
        output: the output of the quantized model.
        reference: the output of the float model.
        batch: the input of both models. Positions outside its ``attention_mask`` do not count.

    Returns:
        a tensor without axes.

    Raises:
        CalibrationError: if the outputs cannot be compared, or a loss of the user's own raises an error.
    """
    if callable(loss):
        return _checked(_found(loss, output, reference))
    ours, theirs = _compared(loss, output), _compared(loss, reference)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs] or not ours:
        raise CalibrationError(
            f"the outputs of the two models cannot be compared: {_shapes(ours)} from the quantized model, "
            f"{_shapes(theirs)} from the reference; give the float model that it was made from, or a loss= of your own"
        )
    losses = []
    for own, other in zip(ours, theirs, strict=True):
        where = counted(batch, own)
        losses.append(_COMPARED[loss](own[where], other.to(own.device)[where]))
    return torch.stack(losses).mean()


def _found(loss: Callable[[Any, Any], Tensor], output: Any, reference: Any) -> object:
    try:
        return loss(output, reference)
    except Exception as error:
        name = getattr(loss, "__name__", type(loss).__name__)
        raise CalibrationError(
            f"loss={name} failed with {type(error).__name__}: {error}. It was called with the output of the quantized "
            "model and the output of the float model"
        ) from error


def _checked(found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise CalibrationError(f"loss= must return a floating tensor of one element, not {what}")
    return found.reshape(())


def _compared(loss: str, output: Any) -> list[Tensor]:
    """Return the tensors of an output that a loss compares."""
    if loss != "kl":
        return list(floating(output))
    logits = _logits(output)
    found = next(floating(output), None) if logits is None else logits
    return [] if found is None or not found.dim() else [found]


def _logits(output: Any) -> Tensor | None:
    found = named(output, "logits")
    return found if found is not None and found.is_floating_point() else None


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no floating tensor"
