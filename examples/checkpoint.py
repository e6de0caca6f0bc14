"""A state dict and a file, quantized without a model class, with an embedding kept and an output layer excluded."""

import torch
from safetensors.torch import save_file

import fewbits

torch.manual_seed(0)
state_dict = {
    "model.embed_tokens.weight": torch.randn(1000, 256),
    "model.layers.0.mlp.up_proj.weight": torch.randn(512, 256) / 16,
    "model.layers.0.mlp.down_proj.weight": torch.randn(256, 512) / 16,
    "model.norm.weight": torch.ones(256),
    "lm_head.weight": torch.randn(1000, 256) / 16,
}

result = fewbits.quantize(state_dict, "int4", exclude=["lm_head"])
print(result.ledger)
up_proj = result.model["model.layers.0.mlp.up_proj.weight"]
print(up_proj.spec, up_proj.packed.shape, up_proj.scale.shape)

save_file(state_dict, "float.safetensors")
result = fewbits.quantize("float.safetensors", "int4", exclude=["lm_head"], output="small.safetensors")
print(result.report.summary())
tensors = fewbits.load("small.safetensors")
if not tensors["model.layers.0.mlp.up_proj.weight"].equal(up_proj):
    raise SystemExit("the file holds other codes than the state dict gave")
