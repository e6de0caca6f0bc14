"""Schemes of one's own: other bits, levels that are not evenly spaced, another way to pick scales."""

from statistics import NormalDist

import torch
from torch import nn

import fewbits


class Int6(fewbits.Quantizer):
    """6 bits a weight, groups of 64."""

    name = "int6"
    spec = fewbits.QuantSpec(bits=6, granularity="group", group_size=64)


def quantiles(count: int) -> list[float]:
    """That many rising numbers up to 1, as dense as a normal distribution."""
    return [NormalDist().inv_cdf(0.5 + 0.48 * i / count) / NormalDist().inv_cdf(0.98) for i in range(1, count + 1)]


class Normal4(fewbits.Quantizer):
    """4 bits a weight, groups of 128; codes mean quantiles of the normal distribution."""

    name = "normal4"
    levels = (*(-level for level in reversed(quantiles(7))), 0.0, *quantiles(8))
    spec = fewbits.QuantSpec(bits=4, granularity="group", group_size=128, levels=levels)


class Clipped(fewbits.extend.Observer):
    """Scales from a share of the largest magnitude: fewer values in range, finer steps for them."""

    def __init__(self, share: float) -> None:
        self.share = share

    def observe_weight(self, weight: torch.Tensor, spec: fewbits.QuantSpec) -> fewbits.extend.QuantParams:
        params = fewbits.MinMaxObserver().observe_weight(weight, spec)
        # A group of zeros has the smallest scale there is already.
        scale = (params.scale * self.share).clamp(min=torch.finfo(params.scale.dtype).tiny)
        return fewbits.extend.QuantParams(scale, params.zero_point)


torch.manual_seed(0)
model = nn.Linear(512, 512)
nn.init.normal_(model.weight)
for quantizer in (Int6(), fewbits.Int4Grouped(), fewbits.Int4Grouped(observer=Clipped(0.9)), Normal4()):
    result = fewbits.quantize(model, quantizer)
    measurement = result.report.tensors[0].measurement
    print(f"{result.ledger['weight'].scheme}: {measurement.sqnr_db:.2f} dB, {result.ledger.bytes_after:,} bytes")
