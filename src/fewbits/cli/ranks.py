"""The process group of torchrun."""

from __future__ import annotations

import atexit
import os

from fewbits.errors import ArgumentError


def own_rank() -> int | None:
    """Return the rank that torchrun gave this process; None for a single process."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and os.environ.get("WORLD_SIZE", "1") != "1" else None


def join_group() -> int | None:
    """Join the process group of torchrun.

    Returns:
        the rank of this process; None for a single process.

    Raises:
        ArgumentError: if torch has no distributed package, or joining fails.
    """
    rank = own_rank()
    if rank is None:
        return None
    import torch.distributed as dist

    if not dist.is_available():
        raise ArgumentError("this build of torch has no torch.distributed; run one process, or install another build")
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(f"rank {rank} of {os.environ['WORLD_SIZE']} cannot join the others: {error}") from None
    atexit.register(dist.destroy_process_group)
    return rank
