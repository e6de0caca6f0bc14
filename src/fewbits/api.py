"""`quantize` runs the whole lifecycle, `plan` previews it, and `verify` checks a file against its source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs
from torch import nn

from fewbits.calibration.running import Forward
from fewbits.calibration.tuning import Tuned, Tuning
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.config.arguments import resolve_settings
from fewbits.config.config import QuantizationConfig
from fewbits.conversion.planned_tuning import PlannedTuning
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute
from fewbits.observers.named import ObserverRecipe
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.lifecycle import plan_for_file
from fewbits.quantizers.outcome import planned_evaluation
from fewbits.rounding.named import RoundingRecipe
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import LayerSelector
from fewbits.sources.open import open_source
from fewbits.validation.report import Report
from fewbits.validation.tensors import CRITICAL_DB
from fewbits.validation.verify import verify as verify_file


@attrs.frozen(eq=False, repr=False)
class Result:
    """The result of `quantize`.

    Attributes:
        model: the quantized result, of the same kind as the source: a model, a mapping {name: Tensor or
            QuantizedTensor}, or the path of the output.
        ledger: the fate of every tensor (quantized, cast, kept, ...), with the reason.
        report: the report of the validation; None with ``validate=False``.
        tuned: the losses before and after tuning, and more; None without ``tune=``.
        quantizer: the quantizer. Unless ``inplace=True``, the quantizer keeps the float model or mapping in memory;
            ``quantizer.reset()`` releases it, and `save` no longer works then.
    """

    model: Any
    ledger: Ledger
    report: Report | None
    quantizer: Quantizer
    tuned: Tuned | None = None

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write the result to a file, or a directory of several; see `Quantizer.save`."""
        self.quantizer.save(path, max_shard_size=max_shard_size)

    def __repr__(self) -> str:
        return f"Result({type(self.model).__name__}, {self.ledger!r}, {self.report!r})"


def quantize(
    source: object,
    scheme: str | Quantizer | None = None,
    *,
    entry: str | None = None,
    config: QuantizationConfig | None = None,
    output: str | os.PathLike[str] | Output | None = None,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    tune: int | Tuning | None = None,
    spill: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    validate: bool = True,
    evaluate: Iterable[Any] | None = None,
    metrics: Sequence[str] | None = None,
    limits: Mapping[str, float] | None = None,
    compute: Compute = "auto",
    observer: ObserverRecipe | None = None,
    rounding: RoundingRecipe | None = None,
    activation_observer: ObserverRecipe | None = None,
    selector: LayerSelector | None = None,
    serializer: Serializer | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Result:
    """Make a model, a state dict or a checkpoint smaller, and validate the result.

    Arguments override `config`, and `config` overrides the defaults.

    Args:
        source: an `nn.Module`, a state dict, or the path of a checkpoint: a safetensors file, one of `torch.save`, or a
            directory of either.
        scheme: a name in `fewbits.schemes.SCHEMES`, such as ``"int8"``, ``"int4"`` or ``"nf4"``, or a new `Quantizer`
            with settings of its own. Optional with a `config`.
        entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that, as a
            training checkpoint does; ``"a.b"`` names an entry within an entry.
        config: settings. A setting that is also an argument is replaced, not merged.
        output: where to write the result, a path or an `Output`; required if `source` is a path.
        model: with a path, a model that has the weights of the checkpoint, for calibration, tuning and `evaluate`; see
            `Quantizer.prepare`.
        data: calibration batches, for observers and rounding strategies that need them. The first 150 samples are run;
            the setting ``samples=`` changes that, and ``samples=None`` runs all; see `Quantizer.observe`. The report's
            `observed` has the number, and whether data was left.
        forward: runs one batch of `data` or `evaluate`, ``forward(model, batch)``, and returns the output.
        tune: tune the scales of the quantized model with `data`, so that its outputs come closer to those of `source`,
            or of `model`: a number of epochs, or a `fewbits.extend.Tuning`; see `fewbits.tune`.
        spill: a directory for temporary files with the activations of the data; None keeps them in memory.
        inplace: quantize the model or mapping itself. After an error or an interruption, the model is usable and partly
            quantized, and the event ``quantized_in_part`` is emitted. `dequantize` then gives a float copy, in which
            the converted weights are rounded.
        validate: check the result.
        evaluate: batches on which the validation compares the outputs of the float model and of the quantized one;
            other batches than `data`. The float model runs the first batch before the conversion. See
            `Quantizer.validate`.
        metrics: the figures to compare by, such as ``["kl", "top1"]``; see `Quantizer.validate`.
        limits: the worst figures with which the validation passes, such as ``{"kl": 0.1}``.
        compute: how the layers of a model may compute; see `set_compute`.
        observer: picks the scales of weights: a name or a table as in the config, or an observer.
        rounding: picks the codes: a name or a table as in the config, or a strategy.
        activation_observer: picks the scales of inputs; given like `observer`.
        selector: decides which tensors are quantized, in place of the rules in the settings.
        serializer: writes and reads the result; by default a safetensors file.
        progress: called before and after every tensor.
        settings: any other setting of `QuantizationConfig`, such as ``group_size=64`` or ``exclude=["lm_head"]``.

    Raises:
        ArgumentError: for an unknown scheme or setting, or arguments that contradict each other.
        FewbitsError: the errors of the steps; see `Quantizer`. After the conversion, in tuning and validation, the
            error's `result` holds the finished `Result`.
    """
    settings |= {"observer": observer, "rounding": rounding, "activation_observer": activation_observer}
    settings |= {"selector": selector, "serializer": serializer}
    config, quantizer = resolve_settings(scheme, config, settings, quantize)
    float_model = source if model is None else model
    evaluation = planned_evaluation(float_model, evaluate, forward, metrics, limits, validate=validate, inplace=inplace)
    tuning = None
    if tune is not None:
        tuning = PlannedTuning.of(tune, float_model, data, forward, config.samples, inplace=inplace)
    quantizer.prepare(source, inplace=inplace, entry=entry, model=model)
    try:
        if tuning is not None:
            tuning.check_ledger(quantizer.ledger)
        if model is not None:
            plan_for_file(quantizer, tuning, evaluation)
            evaluation = None  # `validate` takes over the findings of the conversion
        if data is not None:
            quantizer.observe(data, forward=forward, samples=config.samples, spill=spill, progress=progress)
        compare = None if validate else False
        converted = quantizer.convert(output=output, compare=compare, compute=compute, progress=progress)
    except BaseException:
        if quantizer is not scheme:  # the caller has no quantizer to take the hooks off the model
            quantizer.reset()
        raise
    report = None
    try:
        if tuning is not None and model is None:
            tuning.run(converted, progress)
        if validate:
            settings = {} if evaluation is None else attrs.asdict(evaluation, recurse=False)
            settings |= {"on_failure": config.on_failure, "fail_under": config.fail_under}
            report = quantizer.validate(**settings, progress=progress)
    except BaseException as error:
        if isinstance(error, Exception):  # an error of the user's data too, unless it takes no attribute
            with suppress(AttributeError):
                finished = _result(converted, quantizer, getattr(error, "report", None), tuning)
                error.result = finished  # type: ignore[attr-defined]
        elif quantizer is not scheme:
            quantizer.reset()
        raise
    return _result(converted, quantizer, report, tuning)


def _result(converted: object, quantizer: Quantizer, report: Report | None, tuning: PlannedTuning | None) -> Result:
    return Result(converted, quantizer.ledger, report, quantizer, None if tuning is None else tuning.result)


@attrs.frozen(eq=False, repr=False)
class Plan:
    """A preview of `quantize`, from names, shapes and dtypes alone.

    Attributes:
        ledger: the fate of every tensor, with its exact bytes before and after.
        shards: the files of the result, with the ledger of each; none if the source is in memory.
        left_behind: files of a source directory that look like weights and would not be part of the result.
        opens_in: who could open the result, and why others could not; None unless the source is the directory of a
            transformers model.
    """

    ledger: Ledger
    shards: tuple[Shard, ...]
    left_behind: tuple[str, ...]
    opens_in: str | None

    def __repr__(self) -> str:
        return f"Plan({self.ledger!r}, {len(self.shards)} files)"


def plan(
    source: object,
    scheme: str | Quantizer | None = None,
    *,
    entry: str | None = None,
    config: QuantizationConfig | None = None,
    output: str | os.PathLike[str] | Output | None = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> Plan:
    """Preview `quantize`: the fate and size of every tensor. Only the headers of a checkpoint are read.

    Args:
        source: a model, a state dict, or the path of a checkpoint.
        scheme: the name of a scheme, or a new `Quantizer`, which is in the state CREATED again afterwards.
        entry: the name of the state dict in a mapping or file that holds more than that.
        config: settings. A setting that is also an argument is replaced, not merged.
        output: where the result of a path would go; by default beside the source.
        model: with a path, a model that has the weights of the checkpoint, if its calibration is planned.
        settings: observers, a selector, a serializer, and all other settings, as in `quantize`.

    Raises:
        FewbitsError: the errors that `quantize` would raise before it reads a weight.
    """
    _, quantizer = resolve_settings(scheme, config, settings, plan)
    quantizer.prepare(source, entry=entry, model=model)
    try:
        shards: tuple[Shard, ...] = ()
        if isinstance(source, (str, os.PathLike)):
            shards = quantizer.share(Output.beside(source) if output is None else output).shards
        return Plan(quantizer.ledger, shards, quantizer.left_behind, quantizer.opens_in)
    finally:
        quantizer.reset()


def verify(
    path: str | os.PathLike[str],
    against: object = None,
    *,
    entry: str | None = None,
    serializer: Serializer | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Read a quantized file and check its digests, its structure, and every element against the source.

    Codes are decoded without any module, by the layout in the file. Checkpoints of other tools (compressed-tensors,
    GPTQ, AWQ, block FP8) are read too: they have no digests, and an error beyond half a step is only a note.

    Args:
        path: the file, or a directory of several.
        against: the source: a model, a state dict, or the path of a checkpoint. None checks the file alone.
        entry: the entry of `against`, as in `quantize`.
        serializer: reads a file of fewbits; by default as a safetensors file.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        FormatError: if the file has no known format, or its parts contradict one another.
        DigestError: if its header is damaged. Damaged tensors are failures in the report.
        CheckpointError: if a file cannot be read.
        ArgumentError: if `against` cannot be compared with, or has no such entry.
    """
    if against is None and entry is not None:
        raise ArgumentError(f"entry={entry!r} is an entry of the source; pass the source too: against=, or --against")
    source = None if against is None else open_source(against, entry=entry)
    return verify_file(path, source, serializer=serializer, fail_under=fail_under, progress=progress)
