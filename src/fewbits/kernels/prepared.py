"""A weight as it lies in memory, together with what computes with it."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from fewbits.kernels.base import Kernel
from fewbits.kernels.weight_layouts import WeightLayout


@attrs.define(eq=False)
class PreparedWeight:
    """Exchanged as one, so that no thread ever meets the kernels of one form with the tensors of another.

    Attributes:
        form: the weight.
        kernels: that compute with it, the most preferred first; none where the reference does.
        description: what ``torch.ops.fewbits.linear`` needs to know; None where only the reference is traced.
        columns: how many inputs a row of the weight has.
        device: where it is.
    """

    form: WeightLayout
    kernels: tuple[Kernel[Any], ...] = ()
    description: str | None = None
    columns: int = attrs.field(init=False)
    device: torch.device = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        # A layer asks for them at every call.
        self.columns, self.device = self.form.layout.columns, self.form.scale.device

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the form, in the order of the description."""
        return list(self.form.tensors().values())
