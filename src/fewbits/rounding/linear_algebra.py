"""Factors of second moments, with the same bits for any number of threads.

LAPACK divides large matrices by the number of threads, which changes the last bits. Here LAPACK only sees blocks that
it does not divide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits._events import emit
from fewbits.errors import NumericsError

_BLOCK = 128

#: Each failed Cholesky decomposition multiplies the damping by ten. Ten times the mean of the diagonal always suffices
#: for a matrix that is positive semidefinite up to rounding.
_TRIES = 6


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix.

    Raises:
        torch.linalg.LinAlgError: if the matrix is not positive definite.
    """
    factor = matrix.clone()
    for start in range(0, len(factor), _BLOCK):
        stop = start + _BLOCK
        corner = factor[start:stop, start:stop] = torch.linalg.cholesky(factor[start:stop, start:stop])
        below = factor[stop:, start:stop]
        if len(below):
            below[:] = torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False)
            factor[stop:, stop:] -= below @ below.mT
    return factor.tril_()


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Add a share of the mean of the diagonal to the diagonal."""
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype) * (damping * float(matrix.diagonal().mean()))


def feedback_factor(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factor the inverse of a damped second moment: upper triangular U with ``U^T U = (moment + damping)^-1``.

    U is the inverse of R, where ``R R^T`` is the damped moment and R is upper triangular. This needs one Cholesky
    decomposition, of the moment in reverse order.

    Args:
        moment: float64, symmetric, positive semidefinite.
        damping: as a share of the mean of the diagonal; it grows until the moment can be factored.

    Returns:
        U in float64, and the damping that was needed.

    Raises:
        NumericsError: if no damping helps.
    """
    for _ in range(_TRIES):
        try:
            factor = cholesky(damped(moment, damping).flip(0, 1)).flip(0, 1)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            emit("info", "damping_increased", columns=len(moment), damping=damping * 10)
            damping *= 10
            continue
        identity = torch.eye(len(moment), dtype=moment.dtype)
        return torch.linalg.solve_triangular(factor, identity, upper=True), damping
    raise NumericsError(f"the second moment of {len(moment)} inputs cannot be factored; it is not positive definite")


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices in the dtype of `left`, in blocks of inner columns, so that threads do not divide a sum."""
    result = left.new_zeros(len(left), right.shape[1])
    for start in range(0, left.shape[1], _BLOCK):
        stop = start + _BLOCK
        result.addmm_(left[:, start:stop], right[start:stop].to(left.dtype))
    return result
