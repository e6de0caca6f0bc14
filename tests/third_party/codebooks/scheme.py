"""`NormalCodebook`: 16 levels at quantiles of the normal distribution."""

from statistics import NormalDist

from fewbits import Quantizer, QuantSpec


def normal_levels(bits):
    """``2**bits`` levels from -1 to 1, with equal probability between neighbours."""
    below, above = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf
    negative = [quantile(0.5 - 0.48 * step / below) / quantile(0.98) for step in range(below, 0, -1)]
    positive = [quantile(0.5 + 0.48 * step / above) / quantile(0.98) for step in range(1, above + 1)]
    return (*negative, 0.0, *positive)


class NormalCodebook(Quantizer):
    """4 bits a weight in groups; each code means a quantile of the normal distribution."""

    name = "normal16"

    def __init__(self, group_size=64, **strategies):
        self.spec = QuantSpec(bits=4, granularity="group", group_size=group_size, levels=normal_levels(4))
        super().__init__(**strategies)
