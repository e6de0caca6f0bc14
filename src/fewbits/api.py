"""`quantize` runs the whole lifecycle, `plan` previews it, and `verify` checks a file against its source."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from fewbits.calibration.running import Forward
from fewbits.calibration.tuning import Tuned, Tuning, check_divisible
from fewbits.calibration.tuning import tune as tune_scales
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.config.config import RUN_SETTINGS, QuantizationConfig, check_settings
from fewbits.conversion.file_tuning import FileTuning
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute
from fewbits.observers.named import ObserverRecipe
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.outcome import evaluation_of
from fewbits.quantizers.schemes import SCHEMES
from fewbits.rounding.named import RoundingRecipe
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import LayerSelector
from fewbits.sources.open import open_source
from fewbits.validation.evaluation import checked_model
from fewbits.validation.report import Report
from fewbits.validation.tensors import CRITICAL_DB
from fewbits.validation.verify import verify as verify_file


@attrs.frozen(eq=False, repr=False)
class Result:
    """The result of `quantize`.

    Attributes:
        model: the quantized result, of the same kind as the source: a model, a mapping {name: Tensor or
            QuantizedTensor}, or the path of the output.
        ledger: what happened to every tensor (quantized, cast, kept, ...), and why.
        report: the report of the validation; None with ``validate=False``.
        tuned: what tuning did; None without ``tune=``.
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
        scheme: ``"int8"``, ``"int8-tensor"``, ``"int4"``, ``"fp16"``, or a new `Quantizer` with settings of its own.
            Optional with a `config`.
        entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that, as a
            training checkpoint does; ``"a.b"`` names an entry within an entry.
        config: settings. A setting that is also an argument is replaced, not merged.
        output: where to write the result, a path or an `Output`; required if `source` is a path.
        model: with a path, a model that has the weights of the checkpoint, for calibration; see `Quantizer.prepare`.
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
            other batches than `data`. See `Quantizer.validate`.
        metrics: what to compare, such as ``["kl", "top1"]``; see `Quantizer.validate`.
        limits: figures of metrics beyond which the validation fails, such as ``{"kl": 0.1}``.
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
        FewbitsError: the errors of the steps; see `Quantizer`.
    """
    _check_evaluation(source, evaluate, metrics, limits, validate=validate, inplace=inplace)
    settings |= {"observer": observer, "rounding": rounding, "activation_observer": activation_observer}
    settings |= {"selector": selector, "serializer": serializer}
    config, quantizer = resolve_settings(scheme, config, settings)
    tuning = None if tune is None else _checked_tuning(tune, source if model is None else model, data, inplace=inplace)
    planned = FileTuning(tuning, data or (), forward, config.samples) if tuning is not None and model else None
    quantizer.prepare(source, inplace=inplace, entry=entry, model=model, tuning=planned)
    tuned = None
    try:
        if data is not None:
            quantizer.observe(data, forward=forward, samples=config.samples, spill=spill, progress=progress)
        compare = None if validate else False
        result = quantizer.convert(output=output, compare=compare, compute=compute, progress=progress)
        if tuning is not None and isinstance(source, nn.Module):
            settings = attrs.asdict(tuning, recurse=False) | {"samples": config.samples, "progress": progress}
            tuned = tune_scales(result, source, data or (), forward=forward, **settings)
        report = None
        if validate:
            report = quantizer.validate(
                evaluate,
                forward=None if evaluate is None else forward,
                metrics=metrics,
                limits=limits,
                on_failure=config.on_failure,
                fail_under=config.fail_under,
                progress=progress,
            )
    except BaseException:
        if quantizer is not scheme:  # the caller has no quantizer to take the hooks off the model
            quantizer.reset()
        raise
    return Result(result, quantizer.ledger, report, quantizer, tuned if planned is None else planned.result)


def _check_evaluation(
    source: object, evaluate: object, metrics: Any, limits: Any, *, validate: bool, inplace: bool
) -> None:
    """Refuse settings of the validation that it would refuse, or not use, after a long conversion.

    Raises:
        ArgumentError: naming the settings.
        CalibrationError: if no outputs of `source` can be compared.
    """
    settings = {"evaluate": evaluate, "metrics": metrics, "limits": limits}
    given = [f"{name}=" for name, value in settings.items() if value is not None]
    if given and not validate:
        raise ArgumentError(f"{' and '.join(given)} set up the validation, which validate=False turns off")
    if given and evaluate is None:
        raise ArgumentError(f"{' and '.join(given)} without evaluate=: pass the batches to compare outputs on")
    if evaluate is not None:
        evaluation_of((), None, metrics, limits)
        checked_model(source, inplace=inplace)


def _checked_tuning(tune: int | Tuning, source: object, data: object, *, inplace: bool) -> Tuning:
    """Return the settings of tuning, if there is all that it needs.

    Raises:
        ArgumentError: with what is missing.
        CalibrationError: if the data has one batch, and no other data is held out.
    """
    tuning = Tuning.of(tune)
    if not isinstance(source, nn.Module):
        raise ArgumentError("tune= needs a model: a state dict or a file has no forward; a file may come with model=")
    if inplace:
        raise ArgumentError("tune= needs the float model beside the quantized one, and inplace=True replaces it")
    if data is None:
        raise ArgumentError("tune= needs data=, batches for the model")
    if isinstance(data, Iterator):
        raise ArgumentError("tune= reads the data more than once; pass a list or a DataLoader, not an iterator")
    if tuning.held_out is None:
        check_divisible(data)
    return tuning


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
    _, quantizer = resolve_settings(scheme, config, settings)
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

    Codes are decoded without any module, by the layout in the file. Checkpoints of compressed-tensors are read too:
    they have no digests, and an error beyond half a step is only a note.

    Args:
        path: the file, or a directory of several.
        against: the source: a model, a state dict, or the path of a checkpoint. None checks the file alone.
        entry: the entry of `against`, as in `quantize`.
        serializer: reads the file; by default as a safetensors file.
        fail_under: SQNR in dB below which a tensor fails.
        progress: called before and after every tensor.

    Raises:
        FormatError: if the file is from neither fewbits nor compressed-tensors, or its parts contradict one another.
        DigestError: if its header is damaged. Damaged tensors are failures in the report.
        CheckpointError: if a file cannot be read.
        ArgumentError: if `against` cannot be compared with, or has no such entry.
    """
    if against is None and entry is not None:
        raise ArgumentError(f"entry={entry!r} is an entry of the source; pass the source too: against=, or --against")
    source = None if against is None else open_source(against, entry=entry)
    return verify_file(path, source, serializer=serializer, fail_under=fail_under, progress=progress)


def resolve_settings(
    scheme: str | Quantizer | None, config: QuantizationConfig | None, settings: Mapping[str, Any]
) -> tuple[QuantizationConfig, Quantizer]:
    """Merge arguments like those of `quantize`.

    Args:
        scheme: the name of a scheme, or a quantizer; None takes the scheme of `config`.
        config: settings, which arguments replace.
        settings: observers, a selector, a serializer, and all other settings, as in `quantize`. None leaves the choice
            of an observer, a selector or a serializer to the config.

    Returns:
        the merged settings, and the quantizer.

    Raises:
        ArgumentError: as `quantize` does.
    """
    if config is not None and not isinstance(config, QuantizationConfig):
        raise ArgumentError(
            f"config must be a QuantizationConfig, not {config!r}; QuantizationConfig.from_file(path) and "
            "QuantizationConfig.from_dict(settings) make one"
        )
    strategies = {name: value for name, value in settings.items() if name in STRATEGIES and value is not None}
    plain = {name: value for name, value in settings.items() if name not in STRATEGIES}
    check_settings(plain, also=_ARGUMENTS)
    if isinstance(scheme, Quantizer):
        return _run_settings(scheme, config, plain | strategies), scheme
    config = _merged(scheme, config, plain)
    return config, config.quantizer(**strategies)


def _merged(scheme: object, config: QuantizationConfig | None, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(scheme, type) and issubclass(scheme, Quantizer):
        raise ArgumentError(f"scheme is the class {scheme.__name__}; pass an instance, {scheme.__name__}()")
    if scheme is None and config is None:
        raise ArgumentError(f"give a scheme or a config; the schemes are {', '.join(map(repr, SCHEMES))}")
    if scheme is not None:
        settings = {"scheme": scheme, **settings}
    return QuantizationConfig(**settings) if config is None else config.replace(**settings)


def _run_settings(
    quantizer: Quantizer, config: QuantizationConfig | None, settings: dict[str, Any]
) -> QuantizationConfig:
    """The settings of the run; all others belong to the quantizer."""
    config = config or QuantizationConfig()
    foreign = [name for name in dict.fromkeys([*settings, *config.changed()]) if name not in RUN_SETTINGS]
    if foreign:
        cls = type(quantizer).__name__
        raise ArgumentError(
            f"{', '.join(foreign)}: pass these to the quantizer, {cls}(...), and rules to its selector, "
            f"{cls}(selector=LayerSelector(...))"
        )
    return config.replace(**settings)


#: Settings that a config cannot hold, or may be given as objects.
STRATEGIES = frozenset({"observer", "rounding", "activation_observer", "selector", "serializer"})

#: The names of the arguments of `quantize`, to suggest one for a misspelled setting.
_ARGUMENTS = [*inspect.signature(quantize).parameters][:-1]
