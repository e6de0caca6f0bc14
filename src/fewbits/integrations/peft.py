"""Adapters of PEFT on quantized models: `import fewbits.integrations.peft` is all that a program needs.

Adapters train on quantized layers without this module too, and every merge that would be lost raises
`ReadOnlyWeightError`. Importing this module changes PEFT for quantized models, and only for these:

- ``merge_and_unload()`` of a LoRA model merges. Each layer with an adapter becomes a float layer, and its weight is
  the dequantized weight plus that of the adapter. ``merge_and_unload(requantize=True)`` quantizes these layers again.
- ``merge_adapter()`` of a LoRA model raises before it has changed a layer.
- Modules in ``modules_to_save`` are trained as float copies, because codes cannot be trained.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._events import emit
from fewbits.errors import ArgumentError, NumericsError, ReadOnlyWeightError
from fewbits.nn.base import QuantizedModule
from fewbits.nn.packed import PackedWeight, store
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.nn.swap import attach, become_float, dequantize, refuse_save_pretrained
from fewbits.nn.walk import forget_tuning, mark_tuned
from fewbits.numerics.quantize import cast, quantize
from fewbits.numerics.spec import CastSpec, QuantSpec


@torch.no_grad()
def merge_and_unload(
    model: nn.Module,
    *,
    requantize: bool = False,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Merge the adapters of a PEFT model into its layers, and return the model without PEFT.

    A quantized layer with an adapter becomes a float layer; other layers stay as they are. After an error the model is
    as it was before.

    Args:
        model: a model of PEFT, with adapters of any kind that can be merged. Its base model is changed in place.
        requantize: quantize these layers again, each with its own scheme, to the nearest codes. Only one of them is
            float at a time.
        safe_merge: raise an error for an adapter with NaN.
        adapter_names: the adapters to merge; None merges the active ones.

    Raises:
        ArgumentError: if `model` has no adapter that can be merged, or `requantize` is set and no layer with an adapter
            is quantized.
        NumericsError: if a merged weight cannot be quantized.
    """
    tuner = _tuner(model)
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, _tuners_utils().BaseTunerLayer)}
    if requantize and not _quantized(layers):
        raise ArgumentError(
            "requantize=True quantizes layers again, and no layer with an adapter is quantized; merge without it, and "
            "quantize the merged model with fewbits.quantize"
        )
    holders = Counter(s for m in tuner.model.modules() for s in stored_weights(m).values())
    stored = {name: _stored(base) for name, base in _quantized(layers).items()}
    shared = {name: before for name, before in stored.items() if any(holders[weight] > 1 for weight in before)}
    changed: list[tuple[nn.Module, str]] = []
    with ExitStack() as undo:
        for name, layer in layers.items():
            changed += _merge(name, layer, requantize, undo, {"safe_merge": safe_merge, "adapter_names": adapter_names})
        undo.pop_all()
    for base, local in changed:
        if requantize:
            mark_tuned(base, local)
        else:
            forget_tuning(base)
    untied = [name for name, before in shared.items() if _stored(layers[name].get_base_layer()) != before]
    merged: nn.Module = tuner.unload()
    refuse_save_pretrained(merged)
    if untied:
        _tell_untied(merged, untied)
    return merged


def _merge(
    name: str, layer: Any, requantize: bool, undo: ExitStack, options: Mapping[str, Any]
) -> list[tuple[nn.Module, str]]:
    """Merge the adapters of one layer; `undo` takes that back. Return the tensors of a quantized layer that changed."""
    base, before = layer.get_base_layer(), list(layer.merged_adapters)
    if not isinstance(base, QuantizedModule):
        undo.callback(_unmerge, layer, before)
        layer.merge(**options)
        return []
    floats = {local: p.detach().clone() for local, p in base._parameters.items() if p is not None}
    stored = become_float(base)
    undo.callback(_put_back, base, stored, floats)
    undo.callback(setattr, layer, "merged_adapters", before)
    layer.merge(**options)
    if layer.merged_adapters == before:  # none of the adapters to merge is in this layer
        _put_back(base, stored, floats)
        return []
    for local, old in stored.items() if requantize else ():
        _requantize(f"{name}.{local}", base, local, old)
    changed = [local for local, values in floats.items() if not torch.equal(getattr(base, local), values)]
    return [(base, local) for local in [*stored, *changed]]


def _unmerge(layer: Any, before: list[str]) -> None:
    """Take all adapters out of a float layer, except those that were merged before."""
    if layer.merged_adapters != before:
        layer.unmerge()
        layer.merge(adapter_names=before)


def _requantize(name: str, base: Any, local: str, old: StoredWeight) -> None:
    """Quantize a float weight again, as it was stored before."""
    try:
        new = _encoded(base._parameters[local].detach(), old)
    except NumericsError as error:
        raise type(error)(f"{name}, merged and quantized again to {old.spec}: {error}") from error
    attach(base, local, new)
    if isinstance(new, PackedWeight) and isinstance(old, PackedWeight):
        new.prepack(old.compute, old.offered)


def _encoded(weight: Tensor, old: StoredWeight) -> StoredWeight:
    if isinstance(old.spec, CastSpec):
        return store(cast(weight, old.spec.dtype), old.dtype)
    value = quantize(weight, attrs.evolve(old.spec.weight_only(), rounding="nearest"), layout=old.layout)
    # A merged weight counts as tuned, and the codes of tuned weights count as free.
    spec = attrs.evolve(old.spec, rounding="free")
    return store(attrs.evolve(value, spec=spec, input_scale=_input_scale(old)), old.dtype)


def _input_scale(stored: StoredWeight) -> Tensor | None:
    static = isinstance(stored.spec, QuantSpec) and stored.spec.activations == "static"
    return stored.value().input_scale if static and isinstance(stored, PackedWeight) else None


def _put_back(base: nn.Module, stored: Mapping[str, StoredWeight], floats: Mapping[str, Tensor]) -> None:
    """Give a layer its stored weights and its float parameters again."""
    become_float(base)
    for local, values in floats.items():
        base._parameters[local].data = values  # type: ignore[union-attr]
    for local, weight in stored.items():
        attach(base, local, weight)


def _quantized(layers: Mapping[str, Any]) -> dict[str, QuantizedModule]:
    """Return the quantized base layers of layers with adapters, by the names of the latter."""
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    return {name: base for name, base in bases.items() if isinstance(base, QuantizedModule)}


def _stored(base: nn.Module) -> list[StoredWeight]:
    return list(stored_weights(base).values())


def _tell_untied(model: nn.Module, names: Sequence[str]) -> None:
    """Say that merged layers no longer share their weight, and tell transformers not to tie them again."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    emit("warning", "untied", layers=list(names), reason="an adapter was merged into one of the layers that shared it")


def _tuner(model: Any) -> Any:
    kind = _tuners_utils().BaseTuner
    tuner = model if isinstance(model, kind) else getattr(model, "base_model", None)
    if not isinstance(tuner, kind):
        raise ArgumentError(
            "merge_and_unload takes a model of peft.get_peft_model or PeftModel.from_pretrained with adapters in its "
            f"layers, such as LoRA, not a {type(model).__name__}"
        )
    return tuner


class _OnQuantizedLayers:
    """What a LoRA model does differently where layers are quantized."""

    def _replace_module(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        stored = stored_weights(child).get("weight")
        if stored is not None:
            # PEFT asks the weight 18 times for its device, and every reading would dequantize it.
            child = SimpleNamespace(weight=torch.empty(0, device=next(stored.buffers()).device))
        replacing: Any = super()
        replacing._replace_module(parent, child_name, new_module, child)

    def merge_and_unload(
        self: Any,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> Any:
        """Merge all adapters; see `fewbits.integrations.peft.merge_and_unload`, which shows no progress bar."""
        if requantize or any(isinstance(module, QuantizedModule) for module in self.model.modules()):
            options: dict[str, Any] = {"safe_merge": safe_merge, "adapter_names": adapter_names}
            return merge_and_unload(self, requantize=requantize, **options)
        parent: Any = super()
        return parent.merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """Merge adapters into float layers, so that they can be taken out again."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, _tuners_utils().BaseTunerLayer)}
        for name, base in _quantized(layers).items():
            raise ReadOnlyWeightError(
                f"{name} is quantized ({_stored(base)[0].spec}); merge_adapter would lose the adapter or the codes. "
                "Use the adapter without merging it; or merge for good with merge_and_unload(), which gives float "
                "layers, or merge_and_unload(requantize=True)"
            )
        parent: Any = super()
        parent.merge_adapter(*args, **kwargs)


def _float_copies(update: Any) -> Any:
    """Wrap `ModulesToSaveWrapper.update`: the copy that it makes of a quantized module becomes a float module."""

    def updated(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        is_new = adapter_name not in self.modules_to_save
        update(self, adapter_name, *args, **kwargs)
        copy = self.modules_to_save[adapter_name]
        if is_new and any(isinstance(module, QuantizedModule) for module in copy.modules()):
            trained = adapter_name == self.active_adapter
            self.modules_to_save[adapter_name] = dequantize(copy).requires_grad_(trained)

    return updated


def _peft(part: str = "") -> Any:
    try:
        return importlib.import_module(f"peft{part}")
    except ModuleNotFoundError as error:
        raise ArgumentError(f"fewbits.integrations.peft needs {error.name}: pip install peft") from None


def _tuners_utils() -> Any:
    return _peft(".tuners.tuners_utils")


_DOC = "PEFT's class of LoRA models, which also merges adapters of quantized layers."


def _registered() -> Any:
    """Put a subclass in the place of PEFT's own class of LoRA models, and return it."""
    peft = _peft()
    registry, kind = peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA
    base = registry[kind]
    # PEFT prints the name, and pickle finds the class by it.
    registry[kind] = type("LoraModel", (_OnQuantizedLayers, base), {"__module__": __name__, "__doc__": _DOC})
    wrapper = _peft(".utils.other").ModulesToSaveWrapper
    wrapper.update = _float_copies(wrapper.update)
    return registry[kind]


#: The class of LoRA models after this module was imported.
LoraModel = _registered()
