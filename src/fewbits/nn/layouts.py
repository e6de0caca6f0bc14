"""Which axes of a module's parameter are its inputs, for all classes that are known; by shape for the others."""

from __future__ import annotations

from torch import Tensor, nn

from fewbits.numerics.layout import Layout
from fewbits.selection.info import layout_by_shape

#: (class, parameter) -> input axes, for classes that multiply otherwise than their last axis with their input.
#: Classes of other libraries are known by name, and nothing is imported.
INPUT_AXES: dict[tuple[str, str], tuple[int, ...]] = {
    ("torch.nn.modules.linear.Bilinear", "weight"): (1, 2),
    ("transformers.pytorch_utils.Conv1D", "weight"): (0,),
    ("transformers.models.llama4.modeling_llama4.Llama4TextExperts", "gate_up_proj"): (1,),
    ("transformers.models.llama4.modeling_llama4.Llama4TextExperts", "down_proj"): (1,),
}


def layout_of(module: nn.Module, name: str, weight: Tensor) -> tuple[Layout, bool]:
    """How a parameter is cut: outputs by inputs.

    Returns:
        the layout, and whether the class declares it; otherwise it follows from the shape.
    """
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        return _convolution(module, shape), True
    axes = _declared(module, name)
    if axes is None and len(shape) == 3 and isinstance(getattr(module, "is_transposed", None), bool):
        # Fused experts of transformers say whether they hold (experts, inputs, outputs) or (experts, outputs, inputs).
        axes = (1,) if module.is_transposed else (2,)
    if axes is not None:
        return Layout.of(shape, inputs=axes), True
    return layout_by_shape(shape), len(shape) == 2


def _declared(module: nn.Module, name: str) -> tuple[int, ...] | None:
    classes = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((INPUT_AXES[cls, name] for cls in classes if (cls, name) in INPUT_AXES), None)


def _convolution(module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> Layout:
    if not module.transposed:
        return Layout.of(shape, inputs=range(1, len(shape)))
    if module.groups == 1:
        return Layout.of(shape, inputs=(0, *range(2, len(shape))))
    # (groups, inputs of a group, outputs of a group, kernel...): every output of every group is a row.
    view = (module.groups, shape[0] // module.groups, *shape[1:])
    return Layout.of(shape, view=view, inputs=(1, *range(3, len(view))))
