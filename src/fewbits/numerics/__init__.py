"""Tensors in, tensors out: specs, layouts, the affine maths, packing, quantized tensors, metrics. Knows no model."""
