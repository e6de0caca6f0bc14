"""`quantize`: the whole lifecycle in one call; `verify`: a file against its source."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from fewbits.calibration import Forward
from fewbits.checkpoint.serializer import Serializer
from fewbits.errors import ArgumentError
from fewbits.quantizers.base import OnFailure, Quantizer, check_on_failure
from fewbits.quantizers.schemes import SCHEMES
from fewbits.selection.ledger import Ledger
from fewbits.selection.progress import Progress, no_progress
from fewbits.selection.selector import LayerSelector
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a file; see `Quantizer.save`."""
        self.quantizer.save(path)

    def __repr__(self) -> str:
        return f"Result({type(self.model).__name__}, {self.ledger!r}, {self.report!r})"


def quantize(
    source: object,
    scheme: str | Quantizer,
    *,
    output: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    validate: bool = True,
    on_failure: OnFailure = "error",
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
    **options: Any,
) -> Result:
    """Make a model, a state dict or a checkpoint smaller, and prove it.

    Args:
        source: an `nn.Module`, a state dict, or the path of a safetensors checkpoint.
        scheme: ``"int8"``, ``"int8-tensor"``, ``"int4"``, ``"fp16"``, or a `Quantizer` of your own, newly made.
        output: where to write the result, if `source` is a path.
        include: name patterns of what is quantized, and nothing else.
        exclude: name patterns of what is kept.
        data: calibration batches, for observers that need them.
        forward: runs one batch, ``forward(model, batch)``.
        inplace: quantize the model or mapping itself.
        validate: check the result.
        on_failure: see `Quantizer.validate`.
        fail_under: see `Quantizer.validate`.
        progress: told about every tensor, before and after it.
        options: arguments of the scheme, such as ``group_size=64``.

    Raises:
        ArgumentError: for a scheme that does not exist, or arguments that do not go together.
        FewbitsError: what the steps raise; see `Quantizer`.
    """
    check_on_failure(on_failure)
    quantizer = _quantizer(scheme, include, exclude, options)
    quantizer.prepare(source, inplace=inplace)
    try:
        if data is not None:
            quantizer.observe(data, forward=forward)
        model = quantizer.convert(output=output, measure=None if validate else False, progress=progress)
        report = None
        if validate:
            report = quantizer.validate(on_failure=on_failure, fail_under=fail_under, progress=progress)
    except BaseException:
        if quantizer is not scheme:  # nobody else can: its hooks must not stay on the model
            quantizer.reset()
        raise
    return Result(model, quantizer.ledger, report, quantizer)


def verify(
    path: str | os.PathLike[str],
    against: object = None,
    *,
    serializer: Serializer | None = None,
    fail_under: float = CRITICAL_DB,
    progress: Progress = no_progress,
) -> Report:
    """Re-read a file that fewbits wrote, and check it: digests, structure, and every element against its source.

    Codes are decoded by the layout that the file states, not through any module.

    Args:
        path: the file.
        against: what it was made from: a model, a state dict, or the path of a checkpoint. None checks the file alone.
        serializer: reads the file; None stands for safetensors.
        fail_under: SQNR in dB below which a tensor fails.
        progress: told about every tensor, before and after it.

    Raises:
        FormatError: if it is not a fewbits file, or its parts contradict one another.
        DigestError: if its header is damaged. Damaged tensors are failures in the report.
        CheckpointError: if a file cannot be read.
    """
    source = None if against is None else open_source(against)
    return verify_file(path, source, serializer=serializer, fail_under=fail_under, progress=progress)


def _quantizer(
    scheme: str | Quantizer, include: Sequence[str], exclude: Sequence[str], options: dict[str, Any]
) -> Quantizer:
    if isinstance(scheme, Quantizer):
        if include or exclude or options:
            given = ", ".join([*(["include"] if include else []), *(["exclude"] if exclude else []), *options])
            raise ArgumentError(f"{given}: pass these to the quantizer itself, {type(scheme).__name__}(...)")
        return scheme
    if isinstance(scheme, type) and issubclass(scheme, Quantizer):
        raise ArgumentError(f"scheme is the class {scheme.__name__}; pass an instance, {scheme.__name__}()")
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        near = difflib.get_close_matches(str(scheme).lower(), SCHEMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; for one of your own pass an instance of its class"
        given = repr(scheme) if isinstance(scheme, str) else f"in a {type(scheme).__name__}"
        raise ArgumentError(f"there is no scheme {given}; there are {', '.join(map(repr, SCHEMES))}{hint}")
    if include or exclude:
        if "selector" in options:
            raise ArgumentError("include and exclude are rules of the default selector; give them to yours instead")
        options = options | {"selector": LayerSelector(include=include, exclude=exclude)}
    _check_options(scheme, options)
    return SCHEMES[scheme](**options)


def _check_options(scheme: str, options: dict[str, Any]) -> None:
    """Refuse what the scheme's class does not take.

    Raises:
        ArgumentError: with the nearest option, and all that there are.
    """
    known: dict[str, None] = {}
    for cls in SCHEMES[scheme].__mro__[:-1]:
        if "__init__" in vars(cls):
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
            known.update((p.name, None) for p in parameters if p.kind is not p.VAR_KEYWORD)
    everywhere = [*known, *inspect.signature(quantize).parameters][:-1]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, everywhere, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ArgumentError(f"{scheme!r} does not take {option}{hint}; it takes {', '.join(known)}")
