"""Other libraries that quantize linear layers. None is needed: those that are not installed are named and left out.

Each module here says which distribution it stands for (`PACKAGE`), which modules it imports (`MODULES`), and lists its
contenders. Imports of the library itself happen inside, when a contender is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.contender import Contender, missing
from benchmarks.peers import bnb, hqq, llamacpp, ort, quanto, torchao

PEERS = (torchao, quanto, bnb, hqq, ort, llamacpp)
PACKAGES = tuple(peer.PACKAGE for peer in PEERS)


def absent() -> list[str]:
    return [peer.PACKAGE for peer in PEERS if missing(peer.MODULES)]


def contenders(dtypes: Sequence[torch.dtype], group_size: int) -> list[Contender]:
    present = [peer for peer in PEERS if not missing(peer.MODULES)]
    return [contender for peer in present for dtype in dtypes for contender in peer.contenders(dtype, group_size)]
