"""What somebody else might publish: a scheme with a codebook, an observer and a serializer for it.

It uses nothing of fewbits but what ``import fewbits`` names.
"""

from codebooks.observer import InputWeightedObserver
from codebooks.scheme import NormalCodebook
from codebooks.serializer import ZipSerializer

__all__ = ["InputWeightedObserver", "NormalCodebook", "ZipSerializer"]
