"""Stored weights in the state dict of a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.nn.stored import StoredWeight, stored_weights
from fewbits.numerics.dtypes import dtype_name
from fewbits.numerics.spec import CastSpec

#: The key in the metadata of a state dict that says how each weight is stored: other codes may have the same shapes.
_STORAGE_SPEC = "fewbits"

_WAY_OUT = (
    "Load the state dict of a float model into the float model, and quantize that; to fill a float model with a file "
    "that fewbits wrote, use fewbits.load(path, into=model)."
)


def add_weights(module: nn.Module, destination: Any, prefix: str, *, keep_vars: bool) -> None:
    """Add the stored weights of a module to a state dict, as `torch.nn.Module._save_to_state_dict` adds tensors."""
    metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata[_STORAGE_SPEC] = {name: stored.storage_spec() for name, stored in stored_weights(module).items()}
    for name, stored in stored_weights(module).items():
        parts = stored.parts() if keep_vars else stored.parts_in(destination, prefix + name)
        destination.update((prefix + name + suffix, part) for suffix, part in parts.items())


def take_weights(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    missing_keys: list[str],
    error_msgs: list[str],
) -> dict[str, Any]:
    """Load the stored weights of a module; the arguments are those of `torch.nn.Module._load_from_state_dict`.

    Returns:
        the other entries of the state dict.
    """
    others = dict(state_dict)
    for name, stored in stored_weights(module).items():
        keys = {suffix: prefix + name + suffix for suffix in stored.suffixes}
        missing = [key for key in keys.values() if key not in others]
        parts = {suffix: others.pop(key) for suffix, key in keys.items() if key in others}
        plain = others.pop(prefix + name, None) if missing else parts.get("")
        has_any = bool(parts) or plain is not None
        if problem := _problem(prefix + name, stored, plain, local_metadata.get(_STORAGE_SPEC, {}).get(name), has_any):
            # One message about float weights is enough for a whole state dict.
            if not (problem.endswith(_WAY_OUT) and any(message.endswith(_WAY_OUT) for message in error_msgs)):
                error_msgs.append(problem)
        elif missing:
            missing_keys += missing
        else:
            try:
                stored.load_parts(parts, assign=bool(local_metadata.get("assign_to_params_buffers")))
            except FewbitsError as error:
                error_msgs.append(f"{prefix}{name}: {error}")
    return others


def _problem(name: str, stored: StoredWeight, plain: object, storage_spec: object, has_any: bool) -> str:
    """Return why a weight cannot be loaded, whatever its parts hold; "" if it can."""
    own = stored.storage_spec()
    cast_to = stored.spec.dtype if isinstance(stored.spec, CastSpec) else None
    if storage_spec not in (None, own) and has_any:
        return f"{name} is stored as {storage_spec} in the state dict, here as {own}"
    if isinstance(plain, Tensor) and plain.dtype != cast_to:
        return (
            f"{name} is {dtype_name(plain.dtype)} in the state dict, and stored as {stored.spec} in this model. "
            f"{_WAY_OUT}"
        )
    return ""
