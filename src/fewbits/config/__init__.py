"""All settings as one value, from Python, a file or the command line."""

from fewbits.config.config import QuantizationConfig as QuantizationConfig
