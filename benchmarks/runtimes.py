"""onnxruntime and OpenVINO as contenders of `benchmarks.forwards`: the model is exported, then quantized by them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("onnxruntime", "onnx", "onnxscript", "openvino", "nncf")

Forward = Callable[..., Tensor]


def builds(folder: Path) -> Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], Forward]]:
    """List the contenders; they write their files into a folder."""
    return {
        "onnxruntime, float": partial(_onnxruntime, folder, quantized=False),
        "onnxruntime, int8 dynamic": partial(_onnxruntime, folder, quantized=True),
        "OpenVINO, float": partial(_openvino, mode=None),
        "OpenVINO, int8": partial(_openvino, mode="INT8_ASYM"),
        "OpenVINO, int4": partial(_openvino, mode="INT4_SYM"),
    }


def _onnxruntime(folder: Path, model: nn.Module, inputs: tuple[Tensor, ...], *, quantized: bool) -> Forward:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"  # a session may map the file
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    if quantized:
        quantize_dynamic(path, path.with_stem("quantized"), weight_type=QuantType.QInt8)
        path = path.with_stem("quantized")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def forward(*values: Tensor) -> Tensor:
        fed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return forward


def _openvino(model: nn.Module, inputs: tuple[Tensor, ...], *, mode: str | None) -> Forward:
    import openvino

    converted: Any = openvino.convert_model(model, example_input=inputs)
    if mode is not None:
        import nncf

        group = {"group_size": 128} if mode.startswith("INT4") else {}
        converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode[mode], **group)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def forward(*values: Tensor) -> Tensor:
        return torch.from_numpy(compiled([value.numpy() for value in values])[0].copy())

    return forward
