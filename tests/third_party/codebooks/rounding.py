"""A rounding strategy from outside."""

import torch

from fewbits.extend import Rounding, decode, encode


class ShrinkRows(Rounding):
    """Tries smaller scales for each row, and keeps those with the least error of the layer's output."""

    needs = "second_moment"
    nearest = True
    objective = "(w - q) H (w - q)^T for each row w, with H = E[x x^T]"

    def choose(self, weight, spec, params, inputs):
        """Shrink the scales of each row."""
        codes = encode(weight, params, spec)
        if spec.granularity == "tensor":
            return params, codes
        least = self.error(weight, decode(codes, params, spec, weight.dtype), inputs)
        for factor in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6):
            tried = params.with_scale(params.scale * factor, spec)
            found = encode(weight, tried, spec)
            error = self.error(weight, decode(found, tried, spec, weight.dtype), inputs)
            better = (error < least).unsqueeze(1)
            params, codes = tried.where(better, params), torch.where(better, found, codes)
            least = torch.minimum(error, least)
        return params, codes

    def error(self, weight, decoded, inputs):
        """Compute the error of each row's output."""
        error = weight.double() - decoded.double()
        return ((error if inputs is None else error @ inputs.second_moment) * error).sum(1)
