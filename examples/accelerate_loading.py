"""Load a result into a model that Accelerate built without memory, and let Accelerate place its modules."""

import accelerate
import torch
from safetensors.torch import save_model
from torch import nn

import fewbits


def build() -> nn.Module:
    return nn.Sequential(nn.Embedding(1000, 128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()


torch.manual_seed(0)
model, ids = build(), torch.randint(1000, (2, 16))
save_model(model, "float.safetensors")
fewbits.quantize("float.safetensors", "int8", output="small.safetensors")

with accelerate.init_empty_weights():
    empty = build()
# In place of accelerate.load_checkpoint_and_dispatch, which knows only the names of the float model.
loaded = fewbits.load("small.safetensors", into=empty)
placed = accelerate.dispatch_model(loaded, device_map={"": "cpu"})
print(placed)
if not torch.equal(placed(ids), fewbits.quantize(model, "int8").model(ids)):
    raise SystemExit("the loaded model computes something else")
