"""The whole lifecycle on a model: prepare, convert, validate, save, load, and back to float."""

import torch
from torch import nn

import fewbits


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


torch.manual_seed(0)
model = build().eval()
images = torch.randn(16, 3, 8, 8)

quantizer = fewbits.Int4Grouped(group_size=64)
quantizer.prepare(model)
quantized = quantizer.convert()
report = quantizer.validate()
quantizer.save("classifier.safetensors")
print(quantizer.ledger)
print(report)

with torch.device("meta"):
    empty = build().eval()
loaded = fewbits.load("classifier.safetensors", into=empty)
if not torch.equal(loaded(images), quantized(images)):
    raise SystemExit("the loaded model computes something else")
agreement = (loaded(images).argmax(1) == model(images).argmax(1)).float().mean()
print(f"same class as the float model: {agreement:.0%}")
print(fewbits.dequantize(loaded))
