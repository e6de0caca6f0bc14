"""A convolutional network and a vision transformer for `benchmarks.quality`, trained here on scikit-learn's digits.

The digits are 1,797 images of 8 x 8 pixels. Every third image is for evaluation only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scores import Scores, divergence

_EPOCHS, _BATCH = 30, 64
#: Images of the training set that decide which tuned scales are kept; calibration does not see them.
_HELD_OUT = 256


class Digits:
    kept: tuple[str, ...] = ()

    def __init__(self, name: str, samples: int) -> None:
        self.name, self._samples = name, samples
        images, labels = _digits()
        held = torch.arange(len(images)) % 3 == 0
        self._train, self._images, self._labels = images[~held], images[held], labels[held]
        self.model = _trained(NETWORKS[name](), self._train, labels[~held])
        self._reference = _log_probabilities(self.model, self._images)

    def calibration(self) -> list[Tensor]:
        return list(self._train[:-_HELD_OUT][: self._samples * 32].split(32))

    def held_out(self) -> list[Tensor]:
        return list(self._train[-_HELD_OUT:].split(32))

    def score(self, model: nn.Module) -> Scores:
        found = _log_probabilities(model, self._images)
        hits = (found.argmax(-1) == self._labels).double().mean()
        return {"KL": divergence([found], [self._reference]), "accuracy": float(hits)}


class Attention(nn.Module):
    """A vision transformer of 2 x 2 patches."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(torch.zeros(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        output: Tensor = self.head(self.blocks(tokens).mean(1))
        return output


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


NETWORKS = {"convnet": convolutional, "transformer": Attention}


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)


def _trained(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(images)).split(_BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.log_softmax(model(images), -1)
