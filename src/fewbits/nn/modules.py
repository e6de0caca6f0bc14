"""Quantized Linear, convolutions and embeddings: the float classes with a stored weight in place of a parameter.

Each is a subclass of the class it replaces, so that ``isinstance`` and every option of the float module keep their
meaning. `fewbits.nn.swap` turns a float module into one of these; they are not constructed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import FewbitsError, ReadOnlyWeightError
from fewbits.nn.stored import StoredWeight

#: A parameter ``p`` that is quantized lives in a child module ``p_stored``.
SUFFIX = "_stored"


class QuantizedModule(nn.Module):
    """What all quantized modules share: a weight that reads as a float tensor and is stored as codes.

    Attributes:
        float_class: the class to go back to.
    """

    float_class: type[nn.Module]
    weight_stored: StoredWeight

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized anew at every access: changing the tensor that is read changes nothing here.

        Raises:
            ReadOnlyWeightError: when it is assigned to.
        """
        return self.weight_stored.dequantize()

    @weight.setter
    def weight(self, value: object) -> None:
        raise ReadOnlyWeightError(
            f"{type(self).__name__}.weight is quantized ({self.weight_stored.spec}) and cannot be assigned to; "
            "load other codes with load_state_dict, or get a float model with fewbits.dequantize(model) first"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a parameter or module without asking the property.
        stored = name + SUFFIX in self.__dict__.get("_modules", ())
        object.__setattr__(self, name, value) if stored else super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; refuse one in the place of a quantized weight."""
        if name + SUFFIX in self._modules:
            setattr(self, name, param)
        super().register_parameter(name, param)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        bias = self.bias
        return bias.to(dtype) if isinstance(bias, Tensor) else None

    def extra_repr(self) -> str:
        """The float module's options, and how the weight is stored."""
        return f"{super().extra_repr()}, weight={self.weight_stored.spec}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stored in stored_weights(self).items():
            for suffix, part in stored.parts().items():
                destination[prefix + name + suffix] = part if keep_vars else part.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others = dict(state_dict)
        for name, stored in stored_weights(self).items():
            keys = {suffix: prefix + name + suffix for suffix in stored.parts()}
            missing = [key for key in keys.values() if key not in others]
            parts = {suffix: others.pop(key) for suffix, key in keys.items() if key in others}
            if missing:
                missing_keys += missing
                continue
            try:
                stored.load_parts(parts, assign=bool(local_metadata.get("assign_to_params_buffers")))
            except FewbitsError as error:
                error_msgs.append(f"{prefix}{name}: {error}")
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class QuantizedLinear(QuantizedModule, nn.Linear):
    """`torch.nn.Linear` with a stored weight of shape (out_features, in_features)."""

    def forward(self, input: Tensor) -> Tensor:
        """Dequantize to the input's dtype, then one `F.linear`."""
        return F.linear(input, self.weight_stored.operand(input.dtype), self._bias(input.dtype))


class _QuantizedConv(QuantizedModule):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """Dequantize to the input's dtype, then the float module's own convolution."""
        return self._conv_forward(input, self.weight_stored.operand(input.dtype), self._bias(input.dtype))


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with a stored weight of shape (out_channels, in_channels / groups, k)."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with a stored weight of shape (out_channels, in_channels / groups, k, k)."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with a stored weight of shape (out_channels, in_channels / groups, k, k, k)."""


class _QuantizedConvTranspose(QuantizedModule):
    _convolve: ClassVar[Callable[..., Tensor]]
    _output_padding: Callable[..., list[int]]
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Dequantize to the input's dtype, then one transposed convolution."""
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return type(self)._convolve(
            input,
            self.weight_stored.operand(input.dtype),
            self._bias(input.dtype),
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )


class QuantizedConvTranspose1d(_QuantizedConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with a stored weight of shape (in_channels, out_channels / groups, k)."""

    _convolve = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_QuantizedConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a stored weight of shape (in_channels, out_channels / groups, k, k)."""

    _convolve = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_QuantizedConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with a stored weight of shape (in_channels, out_channels / groups, k, k, k)."""

    _convolve = staticmethod(F.conv_transpose3d)


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """`torch.nn.Embedding` with a stored weight of shape (num_embeddings, embedding_dim)."""

    def forward(self, input: Tensor) -> Tensor:
        """Dequantize the rows that are asked for (all of them under `max_norm`, which rescales in place)."""
        if self.max_norm is None:
            rows = self.weight_stored.dequantize_rows(input.reshape(-1), self.weight_stored.dtype)
            return rows.reshape(*input.shape, self.embedding_dim)
        return F.embedding(input, self.weight, self.padding_idx, self.max_norm, self.norm_type)


class QuantizedEmbeddingBag(QuantizedModule, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with a stored weight of shape (num_embeddings, embedding_dim)."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Dequantize, then one `F.embedding_bag` (which under `max_norm` rescales rows in place)."""
        weight = self.weight_stored.operand(self.weight_stored.dtype) if self.max_norm is None else self.weight
        return F.embedding_bag(
            input,
            weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


def stored_weights(module: nn.Module) -> dict[str, StoredWeight]:
    """The stored weights that a module itself holds, by parameter name."""
    return {
        name.removesuffix(SUFFIX): child for name, child in module._modules.items() if isinstance(child, StoredWeight)
    }
