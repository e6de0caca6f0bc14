"""`GPTQ` and `Qronos`: choose the codes of a row one after the other, and let later ones make up for earlier errors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fewbits.errors import ArgumentError
from fewbits.numerics.affine import encode
from fewbits.numerics.params import QuantParams
from fewbits.numerics.search import search_scales
from fewbits.numerics.spec import QuantSpec
from fewbits.rounding.base import Rounding
from fewbits.rounding.feedback import Candidate, Feedback
from fewbits.rounding.linear_algebra import product
from fewbits.rounding.nearest import ScaleSearch
from fewbits.rounding.statistics import InputStatistics, Needs

#: Rows are solved in multiples of this many: torch multiplies a single row with another routine than several, which
#: would give a row other last bits.
_ROWS = 16

#: Elements of a weight that are solved at a time. Intermediate results take about ten times their memory.
_ELEMENTS = 1 << 23


class GPTQ(Rounding):
    """Minimizes the error of a layer's output on the inputs that it has seen, by error feedback.

    The scales are chosen first, for the weight as it is, with the mean square of each input as importance. Then the
    columns are rounded in order of decreasing mean square, and each column's error is made up for by the columns that
    follow. Then the scales are fitted to the codes, and the columns are rounded again. Each row keeps the best of these
    results, which may be plain rounding. Inputs that are always zero have no say: their columns are rounded to nearest.
    Rows without data are searched as with `ScaleSearch`.

    The method is that of Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022.

    Args:
        damping: added to the diagonal of the second moment, as a share of its mean; it grows if it does not suffice.
        refits: how often columns are rounded again with fitted scales: each time takes a third longer, and lowers the
            objective by about 2 %.
        steps: how many shares of a group's range to try as scales; at least 2.

    Raises:
        ArgumentError: for another value.
    """

    needs: ClassVar[Needs] = "second_moment"
    objective = "(w - q) H (w - q)^T for each row w, with H = E[x x^T]"

    def __init__(self, damping: float = 0.01, refits: int = 2, steps: int = 12) -> None:
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping <= 10:
            raise ArgumentError(f"damping must be a number above 0, at most 10, not {damping!r}")
        if type(refits) is not int or refits < 0:
            raise ArgumentError(f"refits must be an integer from 0 up, not {refits!r}")
        self.damping, self.refits, self.steps = float(damping), refits, ScaleSearch(steps=steps).steps

    def choose(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, inputs: InputStatistics | None
    ) -> tuple[QuantParams, Tensor]:
        """Round the columns one after the other."""
        if inputs is None:
            return ScaleSearch(steps=self.steps).choose(weight, spec, params, None)
        feedback = inputs.derived((type(self), self.damping), self._feedback)
        size = max(1, _ELEMENTS // weight.shape[1] // _ROWS) * _ROWS
        parts = []
        for start in range(0, len(weight), size):
            count = min(size, len(weight) - start)
            # The last row fills up the block; its copies are dropped.
            rows = torch.arange(start, start + -(-count // _ROWS) * _ROWS).clamp_(max=len(weight) - 1)
            solved = self._solve(weight[rows], spec, params.rows(rows), feedback, inputs)
            parts.append((solved.params.rows(slice(count)), solved.codes[:count]))
        return QuantParams.joined([params for params, _ in parts]), torch.cat([codes for _, codes in parts])

    def error(self, weight: Tensor, decoded: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Compute the `objective` of each row."""
        if inputs is None:
            return ScaleSearch(steps=self.steps).error(weight, decoded, None)
        feedback = inputs.derived((type(self), self.damping), self._feedback)
        error = feedback.target(weight.double()) - decoded.double()
        return (product(error, feedback.moment) * error).sum(1)

    def _feedback(self, inputs: InputStatistics) -> Feedback:
        return Feedback(inputs.second_moment, None, self.damping)

    def _solve(
        self, weight: Tensor, spec: QuantSpec, params: QuantParams, feedback: Feedback, inputs: InputStatistics
    ) -> Candidate:
        target, fits = feedback.target(weight), spec.granularity != "tensor"
        best = feedback.candidate(target, params, encode(weight, params, spec), spec)
        if fits:
            params = search_scales(weight, params, spec, self.steps, importance=inputs.mean_square)
        for _ in range(self.refits + 1 if fits else 1):
            codes = feedback.sweep(target, params, spec)
            if fits:
                swept, params = feedback.fitted(target, params, codes, spec)
                best = best.better(swept)
            best = best.better(feedback.candidate(target, params, codes, spec))
        return best


class Qronos(GPTQ):
    """Minimizes the error of a layer's output, given that the layers before it are quantized.

    The layer of the quantized model gets inputs x, that of the float model other inputs y. The codes make ``Q x`` close
    to ``W y``: they make up for errors of the layers before. Otherwise the method is that of `GPTQ`, applied to
    ``W (G + d) (H + d)^-1`` with ``H = E[x x^T]``, ``G = E[y x^T]`` and the damping d.

    The idea is that of Zhang et al., "Qronos: Correcting the Past by Shaping the Future", 2025; this form of it is
    Brevitas'.
    """

    needs = "cross_moment"
    objective = "E[|W y - Q x|^2] + d |W - Q|^2, x the inputs of the quantized model, y those of the float model"

    def _feedback(self, inputs: InputStatistics) -> Feedback:
        return Feedback(inputs.second_moment, inputs.cross_moment, self.damping)
