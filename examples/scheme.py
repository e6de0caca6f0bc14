"""Schemes of one's own: other bits, and another way to pick scales."""

import torch
from torch import nn

import fewbits


class Int6(fewbits.Quantizer):
    """6 bits a weight, groups of 64."""

    name = "int6"
    spec = fewbits.QuantSpec(bits=6, granularity="group", group_size=64)


class Clipped(fewbits.Observer):
    """Scales from a share of the largest magnitude: fewer values in range, finer steps for them."""

    def __init__(self, share: float) -> None:
        self.share = share

    def observe_weight(self, weight: torch.Tensor, spec: fewbits.QuantSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale, zero_point = fewbits.MinMaxObserver().observe_weight(weight, spec)
        return (scale * self.share).to(scale.dtype), zero_point


torch.manual_seed(0)
model = nn.Linear(512, 512)
for quantizer in (Int6(), fewbits.Int4Grouped(), fewbits.Int4Grouped(observer=Clipped(0.9))):
    result = fewbits.quantize(model, quantizer)
    measurement = result.report.tensors[0].measurement
    print(f"{result.ledger['weight'].scheme}: {measurement.sqnr_db:.2f} dB, {result.ledger.bytes_after:,} bytes")
