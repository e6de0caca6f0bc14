"""Every setting as one value, from Python, from a file or from the command line."""

from fewbits.config.config import QuantizationConfig as QuantizationConfig
