"""Networks that `benchmarks.forwards` times: a sentence encoder, five convolutional networks, and an LSTM.

The convolutional networks have the shapes of well-known ones and random weights, because only their time matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import sentences, texts


@attrs.frozen
class Network:
    """A float model in eval mode, and the tensors of one forward."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]


class Embedder(nn.Module):
    """A sentence encoder with its pooling: token ids to embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=ids).last_hidden_state.mean(1)
        return output


def encoders() -> list[Network]:
    """all-MiniLM-L6-v2 with several batches of docstrings."""
    model, tokenizer = sentences.load()
    embedder = Embedder(model).eval()
    tokens = torch.tensor(tokenizer(texts.docstrings()[:60_000], add_special_tokens=False)["input_ids"])
    shapes = ((1, 16), (8, 32), (32, 64))
    return [Network(f"MiniLM {b} x {t}", embedder, (tokens[: b * t].view(b, t),)) for b, t in shapes]


class Residual(nn.Module):
    """Add a branch to its input, or to a projection of it if the shape changes."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.branch, self.shortcut = branch, nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def _stages(block: Callable[[int, int, int], nn.Module], widths: list[tuple[int, int]], first: int) -> list[nn.Module]:
    blocks, inputs = [], first
    for stage, (width, depth) in enumerate(widths):
        for at in range(depth):
            blocks.append(block(inputs, width, 2 if stage and not at else 1))
            inputs = width
    return blocks


def _basic(inputs: int, outputs: int, stride: int) -> nn.Module:
    branch = nn.Sequential(_conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 3, padding=1))
    return Residual(branch, inputs, outputs, stride)


def _bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
    inner = outputs // 4
    branch = nn.Sequential(_conv(inputs, inner, 1), _conv(inner, inner, 3, stride), nn.Conv2d(inner, outputs, 1))
    return Residual(branch, inputs, outputs, stride)


def _inverted(inputs: int, outputs: int, stride: int) -> nn.Module:
    inner = 6 * inputs
    depthwise = _conv(inner, inner, 3, stride, groups=inner)
    return Residual(
        nn.Sequential(_conv(inputs, inner, 1), depthwise, nn.Conv2d(inner, outputs, 1)), inputs, outputs, stride
    )


def _modern(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A depthwise convolution of 7 x 7, and two of 1 x 1, as in ConvNeXt."""
    depthwise = nn.Conv2d(inputs, inputs, 7, stride, 3, groups=inputs)
    branch = nn.Sequential(depthwise, nn.Conv2d(inputs, 4 * outputs, 1), nn.GELU(), nn.Conv2d(4 * outputs, outputs, 1))
    return Residual(branch, inputs, outputs, stride)


def _plain(inputs: int, outputs: int, stride: int) -> nn.Module:
    return _conv(inputs, outputs, 3, stride)


def _residual_18() -> nn.Module:
    stages = _stages(_basic, [(64, 2), (128, 2), (256, 2), (512, 2)], 64)
    return nn.Sequential(_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *stages, *_head(512))


def _residual_50() -> nn.Module:
    stages = _stages(_bottleneck, [(256, 3), (512, 4), (1024, 6), (2048, 3)], 64)
    return nn.Sequential(_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *stages, *_head(2048))


def _mobile() -> nn.Module:
    stages = _stages(_inverted, [(16, 1), (24, 2), (32, 3), (96, 4), (160, 3), (320, 1)], 16)
    return nn.Sequential(_conv(3, 16, 3, 2), *stages, _conv(320, 1280, 1), *_head(1280))


def _next() -> nn.Module:
    stages = _stages(_modern, [(96, 3), (192, 3), (384, 9), (768, 3)], 96)
    return nn.Sequential(nn.Conv2d(3, 96, 4, 4), *stages, *_head(768))


def _very_deep() -> nn.Module:
    stages = _stages(_plain, [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 3)
    return nn.Sequential(*stages, *_head(512))


CONVOLUTIONAL: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-18-like": _residual_18,
    "ResNet-50-like": _residual_50,
    "MobileNet-like": _mobile,
    "ConvNeXt-like": _next,
    "VGG-16-like": _very_deep,
}


def convolutional() -> list[Network]:
    """Make five networks with one image of 224 x 224 each."""
    image = torch.randn(1, 3, 224, 224)
    return [Network(name, make().eval(), (image,)) for name, make in CONVOLUTIONAL.items()]


class LastStep(nn.Module):
    """A recurrent classifier: an LSTM of two layers and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(256, 512, 2, batch_first=True), nn.Linear(512, 128)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return output


def recurrent() -> list[Network]:
    """Make a recurrent classifier with 1, and with 50 time steps."""
    model = LastStep().eval()
    return [Network(f"LSTM, {steps} steps", model, (torch.randn(1, steps, 256),)) for steps in (1, 50)]
