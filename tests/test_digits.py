"""Two small models, trained here on scikit-learn's handwritten digits, before and after quantization."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is in the extra dev")

HELD_OUT = 360
MAY_LOSE = 3


class RowsOfAnImage(nn.Module):
    """An LSTM that reads the eight rows of an image one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(images.squeeze(1))[0].amax(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then held-out images and labels."""
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(data.target)[order]
    return images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT]


@pytest.fixture(scope="module", params=[RowsOfAnImage, convolutions], ids=["lstm", "convolutions"])
def trained(request: pytest.FixtureRequest, digits: tuple[Tensor, ...]) -> nn.Module:
    images, labels = digits[:2]
    torch.manual_seed(0)
    model = request.param()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def correct(model: nn.Module, digits: tuple[Tensor, ...]) -> int:
    return int((model(digits[2]).argmax(1) == digits[3]).sum())


@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
def test_int8_loses_at_most_three_of_360(trained, digits, activations) -> None:
    before = correct(trained, digits)
    assert before > 0.95 * HELD_OUT, "the float model has not learned enough to show anything"
    quantizer = fewbits.Int8PerChannel(activations=activations)
    quantizer.prepare(trained)
    if activations == "static":
        quantizer.observe([digits[0][:150]])
    quantized = quantizer.convert()
    quantizer.validate()
    rounding = [row.name for row in quantizer.ledger if row.spec is not None and row.spec.activations]
    assert bool(rounding) == (activations is not None)
    assert correct(quantized, digits) >= before - MAY_LOSE
