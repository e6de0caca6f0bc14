"""Train a LoRA adapter on a 4-bit model with PEFT, save and load it, and merge it."""

import peft
import torch
from torch import nn

import fewbits
import fewbits.integrations.peft


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def quantized() -> nn.Module:
    # "exact", because outputs are compared closely below: kernels on some CPUs round inputs to bfloat16.
    return fewbits.quantize(build(), "int4", compute="exact").model


x, y = torch.randn(64, 128), torch.randint(10, (64,))
model = peft.get_peft_model(quantized(), peft.LoraConfig(target_modules=["0", "2"], r=8))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(20):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss: {losses[0]:.2f} before, {losses[-1]:.2f} after")

# The adapter alone is saved. It goes with the quantized model that it was trained on.
model.save_pretrained("adapter")
loaded = peft.PeftModel.from_pretrained(quantized(), "adapter")
trained = model.eval()(x)
if not torch.equal(loaded(x), trained):
    raise SystemExit("the loaded adapter computes something else")

# Layers with an adapter become float layers; the last layer, which has none, stays quantized.
merged = loaded.merge_and_unload()
print(merged)
torch.testing.assert_close(merged(x), trained, rtol=1e-4, atol=1e-4)

# Or each layer with an adapter is quantized again, with its own scheme.
merged = model.merge_and_unload(requantize=True)
print(merged)
print(f"error of the outputs after rounding again: {(merged(x) - trained).abs().max():.3f}")
