"""Quantize a Lightning module with a callback, train its float parameters, and resume the training.

A `Precision` plugin would be too late: the Trainer loads a checkpoint before it calls `convert_module`.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fewbits
from fewbits.nn.base import QuantizedModule


class QuantizedWeights(lightning.Callback):
    """Quantizes the module in place before the Trainer loads a checkpoint and makes optimizers."""

    def __init__(self, scheme: str, **settings: object) -> None:
        self.scheme, self.settings = scheme, settings

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # A second call of the Trainer brings the same module again.
        if not any(isinstance(layer, QuantizedModule) for layer in pl_module.modules()):
            fewbits.quantize(pl_module, self.scheme, inplace=True, **self.settings)


class Classifier(lightning.LightningModule):
    """A network whose biases and norm are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 4))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(epochs: int) -> lightning.Trainer:
    callback = QuantizedWeights("int8", exclude=["net.3.weight"])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], enable_checkpointing=False, **quiet
    )


torch.manual_seed(0)
data = DataLoader(TensorDataset(torch.randn(64, 64), torch.randint(4, (64,))), batch_size=16)
model = Classifier()
first = trainer(2)
first.fit(model, data)
first.save_checkpoint("last.ckpt")
print(model)
expected = torch.cat(first.predict(model, data))

resumed = Classifier()
trainer(2).fit(resumed, data, ckpt_path="last.ckpt")
if not torch.equal(torch.cat(trainer(2).predict(resumed, data)), expected):
    raise SystemExit("the resumed module computes something else")
