"""Quantized modules, and putting them in the place of float ones."""

import fewbits.nn.coded_operations
import fewbits.nn.convolutions
import fewbits.nn.modules  # noqa: F401, registers the quantized forms of torch's classes
