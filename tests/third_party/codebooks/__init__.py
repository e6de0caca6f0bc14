"""A package from outside: a scheme with a codebook, an observer, and a serializer.

It uses only public names of fewbits.
"""

from codebooks.observer import InputWeightedObserver
from codebooks.scheme import NormalCodebook
from codebooks.serializer import ZipSerializer

__all__ = ["InputWeightedObserver", "NormalCodebook", "ZipSerializer"]
