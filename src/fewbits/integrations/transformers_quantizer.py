"""The quantizer that transformers calls while it loads a model: for float models, and for results of fewbits."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits._heap import page_out
from fewbits.checkpoint.codec import Value
from fewbits.checkpoint.folder import find_files
from fewbits.conversion.encoder import naming
from fewbits.errors import ArgumentError, StateError
from fewbits.formats.model_config import OWN_METHOD
from fewbits.integrations.transformers_config import FewbitsConfig
from fewbits.integrations.transformers_experts import use_codes_in_experts
from fewbits.integrations.transformers_loading import ResultLoader, Waiting
from fewbits.integrations.transformers_saving import save_pretrained
from fewbits.nn.swap import dequantize_in_place
from fewbits.nn.walk import slots
from fewbits.numerics.spec import QuantSpec
from fewbits.numerics.tensor import QuantizedTensor
from fewbits.selection.ledger import Ledger
from fewbits.sources.module import describe

__all__ = ["FewbitsConfig", "FewbitsHfQuantizer"]

_auto: Any = importlib.import_module("transformers.quantizers.auto")
_base: Any = importlib.import_module("transformers.quantizers.base")
_core: Any = importlib.import_module("transformers.core_model_loading")

#: Bytes of float weights after which the pages of their files are released.
_PAGES = 64 << 20


@_auto.register_quantizer(OWN_METHOD)
class FewbitsHfQuantizer(_base.HfQuantizer):  # type: ignore[misc]
    """Quantizes a float model while transformers loads it, or loads a result of fewbits."""

    quantization_config: FewbitsConfig

    def __init__(self, quantization_config: FewbitsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._waiting = Waiting()
        self._files: list[str] = []
        self._encoding: Encoding | None = None
        self._pages = _Pages(())

    def validate_environment(self, *args: Any, device_map: object = None, **kwargs: Any) -> None:
        """Refuse to spread a model over devices.

        Raises:
            ArgumentError: if the device map has several devices, or the disk.
        """
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else {str(device_map)}
        if len(places) > 1 or "disk" in places:
            raise ArgumentError(
                f"device_map has {', '.join(sorted(places))}; a quantized model is loaded onto one device: give "
                "device_map='cpu' or another single device. accelerate.dispatch_model(model, device_map) can then "
                "spread the model over several devices"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Tell transformers the name of the file, if only fewbits reads it."""
        if self.pre_quantized and self.quantization_config.first_file is not None:
            config.transformers_weights = self.quantization_config.first_file
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if checkpoint_files is not None and self.quantization_config.first_file is not None:
            # Transformers knows the first file only, and reads all files of this list.
            checkpoint_files[:] = [str(file) for file in _all_files(Path(checkpoint_files[0]))]
        self._files = list(checkpoint_files or ())
        self._pages = _Pages(self._files)
        if not self.pre_quantized:
            self._encoding = Encoding(model, self.quantization_config)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Take over the tensors of a result."""
        if not self.pre_quantized:
            return weight_conversions
        return [ResultLoader(model, self._files, weight_conversions, self._waiting).converter()]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> None:
        """Let the tensors of a result as they are in the file."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of a float model is quantized while it is loaded."""
        return self._encoding is not None and self._encoding.applies_to(param_name)

    def get_quantize_ops(self) -> Any:
        """Return the operation that quantizes a parameter."""
        if self._encoding is None:
            raise StateError("transformers asks to quantize a weight of a model that is quantized already")
        return _Quantize(self._encoding, self._waiting, self._pages)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._waiting.attach(model, reuse_memory=not self.pre_quantized)
        self._encoding = None
        use_codes_in_experts(model)
        # A saved configuration with this entry would lead transformers without fewbits to the file.
        vars(model.config).pop("transformers_weights", None)
        model.save_pretrained = functools.partial(save_pretrained, model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dequantize_in_place(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        vars(model).pop("save_pretrained", None)
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters of the model can be trained."""
        return True


class Encoding:
    """What becomes of the parameters of a float model.

    Args:
        model: the model, on the meta device.
        config: the scheme and its settings.

    Raises:
        ArgumentError: if the config has no scheme, or a strategy needs data.
        SelectionError: if a rule matches nothing, or nothing is left to quantize.
    """

    def __init__(self, model: nn.Module, config: FewbitsConfig) -> None:
        self._quantizer = config.quantizer()
        self._ledger: Ledger = self._quantizer._plan(describe(model))
        static = [row.name for row in self._ledger if row.spec is not None and row.spec.activations == "static"]
        if static:
            raise ArgumentError(f"static activations of {static[0]} need data, and from_pretrained runs none")
        self._encoder = self._quantizer._encoder()
        self._dtypes = {slot.name: slot.tensor.dtype for slot in slots(model)}

    def applies_to(self, name: str) -> bool:
        """Tell whether a parameter is quantized."""
        return name in self._ledger and self._ledger[self._ledger[name].holder].spec is not None

    def encode(self, name: str, tensor: Tensor) -> Value:
        """Return the stored form of a parameter."""
        row = self._ledger[self._ledger[name].holder]
        with naming(row):
            value = self._encoder.encode(row, tensor.to(row.dtype), self._quantizer.observer.fresh())
        if isinstance(row.spec, QuantSpec) and isinstance(value, QuantizedTensor):
            return attrs.evolve(value, spec=row.spec.for_dtype(row.dtype))
        return value

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter that is not quantized in its dtype."""
        return tensor.to(self._dtypes.get(name, tensor.dtype))


class _Quantize(_core.ConversionOps):  # type: ignore[misc]
    """Quantizes the parameters that transformers has read."""

    def __init__(self, encoding: Encoding, waiting: Waiting, pages: _Pages) -> None:
        self._encoding, self._waiting, self._pages = encoding, waiting, pages

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        for name in list(input_dict):
            tensor = input_dict.pop(name)
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            if self._encoding.applies_to(name):
                loaded[name] = self._waiting.add(self._encoding.encode(name, tensor), model.get_parameter(name))
            else:
                loaded[name] = self._encoding.cast(name, tensor)
            self._pages.have_read(tensor.nbytes)
        return loaded


class _Pages:
    """Releases the pages of mapped files from time to time.

    Args:
        files: the paths of the files.
    """

    def __init__(self, files: Collection[str]) -> None:
        self._files, self._unreleased = frozenset(map(os.path.realpath, files)), 0

    def have_read(self, nbytes: int) -> None:
        """Count bytes that were read, and release the pages if there are many."""
        self._unreleased += nbytes
        if self._unreleased > _PAGES:
            self._unreleased = 0
            page_out(self._files)


def _all_files(first: Path) -> Sequence[Path]:
    """List the files of a result, by the path of the first one."""
    return find_files(first.parent, (first.suffix,)).paths if "-of-" in first.name else (first,)
