"""`quantize` runs the whole lifecycle, `plan` previews it, and `verify` checks a file against its source."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from fewbits.calibration.running import Forward
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.config.config import RUN_SETTINGS, SETTINGS, QuantizationConfig, check_settings
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute
from fewbits.observers.named import ObserverRecipe
from fewbits.rounding.named import RoundingRecipe
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import LayerSelector
from fewbits.sources.open import open_source
from fewbits.validation.report import CRITICAL_DB, Report
from fewbits.validation.verify import verify as verify_file


@attrs.frozen(eq=False, repr=False)
class Result:
    """The result of `quantize`.

    Attributes:
        model: the quantized model, mapping {name: Tensor or QuantizedTensor}, or path, like the source.
        ledger: the fate of every tensor.
        report: the report of the validation; None with ``validate=False``.
        quantizer: the quantizer. It holds the float source too, until its `reset`.
    """

    model: Any
    ledger: Ledger
    report: Report | None
    quantizer: Quantizer

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
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    validate: bool = True,
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
        data: calibration batches, for observers that need them. The first 150 samples are run; the setting
            ``samples=`` changes that, and ``samples=None`` runs all; see `Quantizer.observe`. The report's `observed`
            has the number, and whether data was left.
        forward: runs one batch, ``forward(model, batch)``.
        inplace: quantize the model or mapping itself. After an error or an interruption, the model is usable and partly
            quantized, and the event ``quantized_in_part`` is emitted. `dequantize` then gives a float copy, in which
            the converted weights are rounded.
        validate: check the result.
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
    strategies = {
        "observer": observer,
        "rounding": rounding,
        "activation_observer": activation_observer,
        "selector": selector,
        "serializer": serializer,
    }
    config, quantizer = resolve_settings(scheme, config, strategies, settings)
    quantizer.prepare(source, inplace=inplace, entry=entry)
    try:
        if data is not None:
            quantizer.observe(data, forward=forward, samples=config.samples, progress=progress)
        compare = None if validate else False
        model = quantizer.convert(output=output, compare=compare, compute=compute, progress=progress)
        report = None
        if validate:
            report = quantizer.validate(on_failure=config.on_failure, fail_under=config.fail_under, progress=progress)
    except BaseException:
        if quantizer is not scheme:  # the caller has no quantizer to take the hooks off the model
            quantizer.reset()
        raise
    return Result(model, quantizer.ledger, report, quantizer)


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
    selector: LayerSelector | None = None,
    serializer: Serializer | None = None,
    **settings: Any,
) -> Plan:
    """Preview `quantize`: the fate and size of every tensor. Only the headers of a checkpoint are read.

    Args:
        source: as in `quantize`.
        scheme: as in `quantize`; a `Quantizer` returns to the state CREATED.
        entry: as in `quantize`.
        config: as in `quantize`.
        output: where the result of a path would go; by default beside the source.
        selector: as in `quantize`.
        serializer: as in `quantize`.
        settings: as in `quantize`.

    Raises:
        FewbitsError: the errors that `quantize` would raise before it reads a weight.
    """
    _, quantizer = resolve_settings(scheme, config, {"selector": selector, "serializer": serializer}, settings)
    quantizer.prepare(source, entry=entry)
    try:
        if output is None and isinstance(source, (str, os.PathLike)):
            output = Output.beside(source)
        shards = () if output is None else quantizer.shards(output)
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
    scheme: str | Quantizer | None,
    config: QuantizationConfig | None,
    strategies: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[QuantizationConfig, Quantizer]:
    """Merge arguments like those of `quantize`.

    Args:
        scheme: as in `quantize`.
        config: as in `quantize`.
        strategies: observers, selector and serializer, by argument name; None if missing.
        settings: as in `quantize`.

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
    check_settings(settings, also=[*inspect.signature(quantize).parameters][:-1])
    if isinstance(scheme, Quantizer):
        return _run_settings(scheme, config, strategies, settings), scheme
    # A strategy that is given by name is a setting.
    named = {key: value for key, value in strategies.items() if isinstance(value, (str, Mapping)) and key in SETTINGS}
    config = _merged(scheme, config, settings | named)
    return config, config.quantizer(**{key: value for key, value in strategies.items() if key not in named})


def _merged(scheme: object, config: QuantizationConfig | None, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(scheme, type) and issubclass(scheme, Quantizer):
        raise ArgumentError(f"scheme is the class {scheme.__name__}; pass an instance, {scheme.__name__}()")
    if scheme is not None:
        settings = {"scheme": scheme, **settings}
    if config is not None:
        return config.replace(**settings)
    if scheme is None:
        raise ArgumentError(f"give a scheme or a config; the schemes are {', '.join(map(repr, SCHEMES))}")
    return QuantizationConfig(**settings)


def _run_settings(
    quantizer: Quantizer, config: QuantizationConfig | None, strategies: dict[str, Any], settings: dict[str, Any]
) -> QuantizationConfig:
    """The settings of the run; all others belong to the quantizer."""
    config = config or QuantizationConfig()
    given = [*settings, *(name for name, value in strategies.items() if value is not None), *config.changed()]
    foreign = [name for name in dict.fromkeys(given) if name not in RUN_SETTINGS]
    if foreign:
        cls = type(quantizer).__name__
        raise ArgumentError(
            f"{', '.join(foreign)}: pass these to the quantizer, {cls}(...), and rules to its selector, "
            f"{cls}(selector=LayerSelector(...))"
        )
    return config.replace(**settings)
