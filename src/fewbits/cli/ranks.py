"""Under torchrun: one process of many."""

from __future__ import annotations

import atexit
import os

from fewbits.errors import ArgumentError

#: What torchrun tells each process.
_RANK, _COUNT = "RANK", "WORLD_SIZE"


def join_group() -> int | None:
    """Make the process group that torchrun has prepared.

    Returns:
        the rank of this process; None if it is alone.

    Raises:
        ArgumentError: if that does not work out.
    """
    rank, count = os.environ.get(_RANK), os.environ.get(_COUNT, "1")
    if rank is None or count == "1":
        return None
    import torch.distributed as dist

    if not dist.is_available():
        raise ArgumentError("this build of torch has no torch.distributed; run one process, or install another build")
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"rank {rank} of {count} cannot join the others: {error}") from None
    atexit.register(dist.destroy_process_group)
    return int(rank)
