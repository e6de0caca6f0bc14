"""Other libraries that quantize linear layers. A report names those that are not installed.

Each module has the name of its distribution (`PACKAGE`), the modules that it imports (`MODULES`), and `contenders`. It
imports its library only when it builds a contender.
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
