"""Rounding strategies: choose the codes of a weight, given what is known of its inputs."""

from collections.abc import Mapping

from fewbits.rounding.base import Rounding
from fewbits.rounding.gptq import GPTQ, Qronos
from fewbits.rounding.nearest import ImportanceSearch, RoundToNearest, ScaleSearch

#: The strategies by name.
ROUNDINGS: Mapping[str, type[Rounding]] = {
    "nearest": RoundToNearest,
    "scale-search": ScaleSearch,
    "importance-search": ImportanceSearch,
    "gptq": GPTQ,
    "qronos": Qronos,
}

__all__ = ["GPTQ", "ROUNDINGS", "ImportanceSearch", "Qronos", "RoundToNearest", "Rounding", "ScaleSearch"]
