"""The names that transformers gives to the tensors of a checkpoint while it loads them.

Since release 5, files and modules of transformers have different names in many models. Transformers also merges tensors
(the experts of a layer become one parameter), splits them (one projection becomes three), and permutes their rows. Its
own tables and functions say how; they are asked here. Transformers is imported only for a model that it defines.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.errors import MismatchError


@attrs.frozen(eq=False)
class Conversion:
    """Tensors of a checkpoint that transformers turns into one or several parameters.

    Attributes:
        target: the name of the first parameter.
        converter: transformers' ``WeightConverter``, without tensors.
        sources: the name of each tensor in the checkpoint, with the pattern of the converter that it matches.
    """

    target: str
    converter: Any
    sources: list[tuple[str, str]] = attrs.field(factory=list)

    @property
    def names(self) -> list[str]:
        """The names of the tensors in the checkpoint."""
        return [name for name, _ in self.sources]

    def run(self, tensors: Mapping[str, Tensor], model: StandIn) -> dict[str, Tensor]:
        """Convert tensors.

        Args:
            tensors: the tensors by their names in the checkpoint.
            model: what the converter may ask about the model.

        Returns:
            the parameters by their names in the model, each in memory of its own.

        Raises:
            MismatchError: if transformers cannot convert tensors of these shapes.
        """
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, tensors[name])
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except Exception as error:  # the operations are transformers' or the user's, and may raise anything
            raise MismatchError(
                f"{', '.join(self.names[:3])} cannot be converted to {self.target} as transformers does it: {error}"
            ) from error
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: _alone(tensor) for name, tensor in tensors.items()}


def _alone(tensor: Tensor) -> Tensor:
    """Copy a tensor that is a part of a larger one, which could not be freed otherwise."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


@attrs.frozen(eq=False)
class StandIn:
    """Answers the questions of converters about a model.

    Attributes:
        config: the configuration of the model.
        parameters: tensors with the shapes and dtypes of its parameters, by name.
    """

    config: Any
    parameters: Mapping[str, Tensor]

    def get_parameter(self, name: str) -> Tensor:
        """Return a tensor with the shape of a parameter."""
        return self.parameters[name]


@attrs.frozen(eq=False)
class NamePlan:
    """Where the tensors of a checkpoint go in a model.

    Attributes:
        renamed: the name in the model of each tensor that is not converted, by its name in the checkpoint. A tensor
            that the model lacks keeps its name.
        conversions: the conversions of all other tensors.
    """

    renamed: Mapping[str, str]
    conversions: Sequence[Conversion]


def transforms_of(model: nn.Module) -> list[Any] | None:
    """Return transformers' renamings and converters for a model, in order; None if transformers does not define it."""
    bases = [cls for cls in type(model).__mro__ if cls.__name__ == "PreTrainedModel"]
    if not any(cls.__module__ == "transformers.modeling_utils" for cls in bases):
        return None
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ModuleNotFoundError:  # before release 5, files had the names of modules
        return None
    return list(mapping.get_model_conversion_mapping(model))


def plan_names(model: Any, names: Iterable[str], transforms: Collection[Any]) -> NamePlan:
    """Find out where transformers puts each tensor of a checkpoint.

    Args:
        model: a model of transformers.
        names: the names of all tensors of the checkpoint.
        transforms: transformers' renamings and converters for the model.
    """
    core = importlib.import_module("transformers.core_model_loading")
    # Some transforms change while they are used.
    transforms = copy.deepcopy(list(transforms))
    renamings = [each for each in transforms if isinstance(each, core.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, core.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    renamed: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    for name in sorted(names, key=core.dot_natural_key):
        target, pattern = core.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = core.rename_source_key(name, [], [], prefix, state)
        if target in state and pattern is not None:
            conversion = conversions.setdefault(target, Conversion(target, by_pattern[pattern]))
            conversion.sources.append((name, pattern))
        else:
            renamed[name] = target if target in state else name
    return NamePlan(renamed, list(conversions.values()))


def meta_like(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
