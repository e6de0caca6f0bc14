"""onnxruntime: MatMulNBits with 4 and 8 bits, int8 activations allowed (accuracy level 4, its fastest)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contender import Contender, Layer

PACKAGE = "onnxruntime"
MODULES = ("onnxruntime", "onnx")

#: The largest block that MatMulNBits takes.
LARGEST_BLOCK = 256


def contenders(dtype: torch.dtype, group_size: int) -> list[Contender]:
    if dtype != torch.float32:
        return []
    block = min(group_size, LARGEST_BLOCK)
    return [
        Contender(
            f"onnxruntime {bits} bit g{block}",
            PACKAGE,
            dtype,
            bits,
            build=partial(Session.of, bits, block),
            start=partial(_start, bits, block),
        )
        for bits in (4, 8)
    ]


def _start(bits: int, block: int, layer: nn.Linear) -> Callable[[], tuple[Any, Any]]:
    import numpy as np
    from onnxruntime.capi import _pybind_state as native

    outputs, inputs = layer.weight.shape
    blocks = -(-inputs // block)
    matrix = np.zeros((blocks * block, outputs), dtype=np.float32)
    matrix[:inputs] = layer.weight.detach().T.numpy()
    quantize = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[bits]

    def run() -> tuple[Any, Any]:
        codes = np.zeros((outputs, blocks, block * bits // 8), dtype=np.uint8)
        scales = np.zeros((outputs, blocks), dtype=np.float32)
        zero_points = np.zeros((outputs, -(-blocks * bits // 8)), dtype=np.uint8)
        quantize(codes, matrix, scales, zero_points, block, outputs, inputs, True)
        return codes, scales

    return run


class Session:
    def __init__(self, model: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {"x": x.numpy()})[0])

    @classmethod
    def of(cls, bits: int, block: int, layer: nn.Linear) -> Layer:
        codes, scales = _start(bits, block, layer)()
        outputs, inputs = layer.weight.shape
        return cls(_model(codes, scales, inputs, outputs, bits=bits, block_size=block))


def _model(codes: Any, scales: Any, inputs: int, outputs: int, **attributes: int) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        accuracy_level=4,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales.reshape(-1), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
