"""A package from outside: a scheme with a codebook, an observer, a rounding strategy and a serializer.

It uses only public names of fewbits.
"""

from codebooks.observer import InputWeightedObserver
from codebooks.rounding import ShrinkRows
from codebooks.scheme import NormalCodebook
from codebooks.serializer import ZipSerializer

__all__ = ["InputWeightedObserver", "NormalCodebook", "ShrinkRows", "ZipSerializer"]
