"""Save a quantized model and its optimizer with `torch.distributed.checkpoint`, and continue the training.

The checkpoint holds tensors by name and no spec. So it also gets the schemes, and they are compared before the codes
are loaded: codes of two schemes may have the same shapes.
"""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import fewbits
from fewbits.nn.stored import stored_weights


class Training(Stateful):
    """A quantized model and an optimizer of its float parameters."""

    def __init__(self, scheme: str, seed: int) -> None:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64))
        self.model = fewbits.quantize(layers, scheme).model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        output = self.model(x)
        output.square().mean().backward()
        self.optimizer.step()
        return output.detach()

    def schemes(self) -> dict[str, str]:
        """The scheme of each quantized weight."""
        modules = self.model.named_modules()
        return {f"{name}.{w}": str(s.spec) for name, module in modules for w, s in stored_weights(module).items()}

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schemes": self.schemes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["schemes"] != self.schemes():
            raise SystemExit(f"the checkpoint was made with {state['schemes']}, this model has {self.schemes()}")
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


x = torch.randn(4, 64)
first = Training("int8", seed=0)
for _ in range(3):
    first.step(x)
dcp.save({"training": first}, checkpoint_id="checkpoint", no_dist=True)
second = Training("int8", seed=1)
dcp.load({"training": second}, checkpoint_id="checkpoint", no_dist=True)
print(second.schemes())
for _ in range(2):
    if not torch.equal(second.step(x), first.step(x)):
        raise SystemExit("the continued training computes something else")
