"""`quantize`: the whole lifecycle in one call; `verify`: a file against its source."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from fewbits.calibration import Forward
from fewbits.checkpoint.output import Output
from fewbits.checkpoint.serializer import Serializer
from fewbits.checkpoint.shards import Shard
from fewbits.config.config import RUN_SETTINGS, QuantizationConfig, check_settings
from fewbits.errors import ArgumentError
from fewbits.kernels.base import Compute
from fewbits.observers.named import ObserverRecipe
from fewbits.quantizers.base import Quantizer
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import Selector
from fewbits.sources.open import open_source
from fewbits.validation.report import CRITICAL_DB, Report
from fewbits.validation.verify import verify as verify_file


@attrs.frozen(eq=False, repr=False)
class Result:
    """What `quantize` returns.

    Attributes:
        model: what came in, quantized: a model, a mapping {name: Tensor or QuantizedTensor}, or the path of a file.
        ledger: the fate of every tensor.
        report: what validation found; None if it was not asked for.
        quantizer: the quantizer that did it. It holds the float source too, until its `reset`.
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
    activation_observer: ObserverRecipe | None = None,
    selector: Selector | None = None,
    serializer: Serializer | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Result:
    """Make a model, a state dict or a checkpoint smaller, and prove it.

    What is given here outranks `config`, and that the defaults.

    Args:
        source: an `nn.Module`, a state dict, or the path of a checkpoint: a safetensors file, one of `torch.save`, or a
            directory of either.
        scheme: ``"int8"``, ``"int8-tensor"``, ``"int4"``, ``"fp16"``, or a `Quantizer` of your own, newly made, which
            brings its own settings. It can be left out if there is a `config`.
        entry: the name of the state dict in a mapping, or a file of `torch.save`, that holds more than that, as a
            training checkpoint does; ``"a.b"`` names an entry within an entry.
        config: settings; those given here replace them one by one, each as a whole.
        output: where to write the result, if `source` is a path; an `Output` says how, too.
        data: calibration batches, for observers that need them. Of these, the first 150 samples are run, unless the
            setting ``samples=`` says how many, or ``samples=None`` that all are; see `Quantizer.observe`. The report's
            `observed` has the number, and whether data was left.
        forward: runs one batch, ``forward(model, batch)``.
        inplace: quantize the model or mapping itself. If an error or an interruption ends it halfway, the model is
            usable and quantized in part, and the event ``quantized_in_part`` says so: `dequantize` gives a float copy,
            in which the weights that were converted are rounded.
        validate: check the result.
        compute: what the layers of a model may do to be fast; see `set_compute`.
        observer: picks the scales of weights: a name or a table as in the config, or an observer.
        activation_observer: likewise for the inputs of layers.
        selector: decides which tensors are quantized, in place of the rules in the settings.
        serializer: writes and reads the result; None stands for safetensors.
        progress: told about every tensor, before and after it.
        settings: any other setting of `QuantizationConfig`, such as ``group_size=64`` or ``exclude=["lm_head"]``.

    Raises:
        ArgumentError: for a scheme or a setting that does not exist, or arguments that do not go together.
        FewbitsError: what the steps raise; see `Quantizer`.
    """
    strategies = {
        "observer": observer,
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
        if quantizer is not scheme:  # nobody else can: its hooks must not stay on the model
            quantizer.reset()
        raise
    return Result(model, quantizer.ledger, report, quantizer)


@attrs.frozen(eq=False, repr=False)
class Plan:
    """What `quantize` would do, known from names, shapes and dtypes alone.

    Attributes:
        ledger: the fate of every tensor, with its bytes before and after, exactly.
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
    selector: Selector | None = None,
    serializer: Serializer | None = None,
    **settings: Any,
) -> Plan:
    """See what `quantize` would make of a source, before anything is spent. Of a checkpoint only headers are read.

    Args:
        source: as in `quantize`.
        scheme: likewise; a `Quantizer` is back in the state CREATED afterwards.
        entry: likewise.
        config: likewise.
        output: where the result of a path would go; None stands for a place beside the source.
        selector: as in `quantize`.
        serializer: likewise.
        settings: likewise.

    Raises:
        FewbitsError: what `quantize` would raise before it looks at a number.
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
    """Re-read what was written, and check it: digests, structure, and every element against its source.

    Codes are decoded by the layout that the file states, not through any module. Other tools' checkpoints in the
    formats of compressed-tensors are read too: they have no digests, and an error beyond half a step is a note there.

    Args:
        path: the file, or the directory of several.
        against: what it was made from: a model, a state dict, or the path of a checkpoint. None checks the file alone.
        entry: of `against`, as in `quantize`.
        serializer: reads the file; None stands for safetensors.
        fail_under: SQNR in dB below which a tensor fails.
        progress: told about every tensor, before and after it.

    Raises:
        FormatError: if it is neither fewbits' nor compressed-tensors', or its parts contradict one another.
        DigestError: if its header is damaged. Damaged tensors are failures in the report.
        CheckpointError: if a file cannot be read.
        ArgumentError: if `against` is nothing that can be compared with, or has no such entry.
    """
    if against is None and entry is not None:
        raise ArgumentError(
            f"entry={entry!r} is of what the file was made from; pass that, too: against=, or --against"
        )
    source = None if against is None else open_source(against, entry=entry)
    return verify_file(path, source, serializer=serializer, fail_under=fail_under, progress=progress)


def resolve_settings(
    scheme: str | Quantizer | None,
    config: QuantizationConfig | None,
    strategies: dict[str, Any],
    settings: dict[str, Any],
) -> tuple[QuantizationConfig, Quantizer]:
    """What arguments as those of `quantize` come to.

    Args:
        scheme: as in `quantize`.
        config: likewise.
        strategies: observers, selector and serializer, by the names of the arguments; None for those not given.
        settings: likewise.

    Returns:
        the settings that count, and the quantizer.

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
    # A strategy that is named, not made, is a setting.
    named = {key: value for key, value in strategies.items() if key.endswith("observer") and _is_recipe(value)}
    config = _merged(scheme, config, settings | named)
    return config, config.quantizer(**{key: value for key, value in strategies.items() if key not in named})


def _is_recipe(value: object) -> bool:
    return isinstance(value, (str, Mapping))


def _merged(scheme: object, config: QuantizationConfig | None, settings: dict[str, Any]) -> QuantizationConfig:
    if isinstance(scheme, type) and issubclass(scheme, Quantizer):
        raise ArgumentError(f"scheme is the class {scheme.__name__}; pass an instance, {scheme.__name__}()")
    if scheme is not None:
        settings = {"scheme": scheme, **settings}
    if config is not None:
        return config.replace(**settings)
    if scheme is None:
        raise ArgumentError(f"there is neither a scheme nor a config; the schemes are {', '.join(map(repr, SCHEMES))}")
    return QuantizationConfig(**settings)


def _run_settings(
    quantizer: Quantizer, config: QuantizationConfig | None, strategies: dict[str, Any], settings: dict[str, Any]
) -> QuantizationConfig:
    """The settings of the run, for a quantizer that brings all others itself."""
    config = config or QuantizationConfig()
    given = [*settings, *(name for name, value in strategies.items() if value is not None), *config.changed()]
    foreign = [name for name in dict.fromkeys(given) if name not in RUN_SETTINGS]
    if foreign:
        cls = type(quantizer).__name__
        raise ArgumentError(
            f"{', '.join(foreign)}: these belong to the quantizer, {cls}(...); rules of selection to its selector, "
            f"{cls}(selector=LayerSelector(...))"
        )
    return config.replace(**settings)
