"""Transformers: quantize while loading, load results, and calibrate directories.

Importing this module registers fewbits with transformers, if that is installed: ``from_pretrained`` then takes a
`FewbitsConfig`, and loads the results of fewbits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fewbits.errors import ArgumentError
from fewbits.integrations.transformers_calibration import LoadedDirectory, load_directory, quantize_directory

__all__ = ["FewbitsConfig", "LoadedDirectory", "load_directory", "quantize_directory"]

if importlib.util.find_spec("transformers") is not None:
    from fewbits.integrations.transformers_quantizer import FewbitsConfig
else:

    def __getattr__(name: str) -> Any:
        if name == "FewbitsConfig":
            raise ArgumentError("FewbitsConfig needs transformers: pip install 'fewbits[transformers]'")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
