"""Tensors that other tools quantized are recognized by names and dtypes, and refused with the name of the format."""

import pytest
import safetensors.torch
import torch
from torch import nn

import fewbits
from fewbits.errors import SourceError
from support.fp8 import codes, scales
from support.lifecycle_helpers import quantize_small

U8, I8, I32, F8 = torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn


def tensors(**dtypes):
    """Small tensors of the given dtypes; a double underscore in a keyword becomes a dot in the name."""
    return {name.replace("__", "."): torch.ones(8, 16).to(dtype) for name, dtype in dtypes.items()}


FORMATS = {
    "GPTQ": (tensors(l__qweight=I32, l__qzeros=I32, l__scales=torch.half, l__g_idx=I32), "GPTQ,",
             r"l\.qweight \(int32, shape \(8, 16\)\).*l\.qzeros, l\.scales, l\.g_idx"),
    "AWQ": (tensors(l__qweight=I32, l__qzeros=I32, l__scales=torch.half), "AWQ,", r"l\.qweight .*l\.qzeros, l\.scales"),
    "Marlin": (tensors(l__qweight=I32, l__scales=torch.half), "GPTQ, AWQ, or", r"l\.qweight .*l\.scales"),
    "at the root": (tensors(qweight=I32, scales=torch.half), "GPTQ, AWQ, or", r"qweight .*with scales"),
    "pack-quantized": (tensors(l__weight_packed=I32, l__weight_scale=torch.bfloat16, l__weight_shape=torch.int64),
                       "compressed-tensors' pack-quantized, which fewbits writes too",
                       r"l\.weight_packed .*l\.weight_scale"),
    "another part": (tensors(a__in_proj_weight_packed=I32, a__in_proj_weight_scale=torch.half),
                     "compressed-tensors' pack-quantized", r"a\.in_proj_weight_packed .*a\.in_proj_weight_scale"),
    "NVFP4": (tensors(l__weight_packed=U8, l__weight_scale=F8, l__weight_global_scale=torch.float32),
              "NVFP4 of compressed-tensors", r"l\.weight_packed .*l\.weight_scale, l\.weight_global_scale"),
    "NVFP4 of ModelOpt": (tensors(l__weight=U8, l__weight_scale=F8, l__weight_scale_2=torch.float32),
                          "NVFP4 of ModelOpt", r"l\.weight \(uint8.*l\.weight_scale, l\.weight_scale_2"),
    "MXFP4": (tensors(l__weight_packed=U8, l__weight_scale=U8), "MXFP4 of compressed-tensors", r"l\.weight_packed"),
    "gpt-oss": (tensors(e__gate_up_proj_blocks=U8, e__gate_up_proj_scales=U8, e__gate_up_proj_bias=torch.bfloat16),
                "MXFP4, as in gpt-oss", r"e\.gate_up_proj_blocks .*e\.gate_up_proj_scales"),
    "packed otherwise": (tensors(l__weight_packed=torch.int64, l__weight_scale=torch.half), "packed codes",
                         r"l\.weight_packed"),
    "int8": (tensors(l__weight=I8, l__weight_scale=torch.half), "int8 of compressed-tensors", r"l\.weight \(int8"),
    "bitsandbytes int8": (tensors(l__weight=I8, l__SCB=torch.float32, l__weight_format=U8), "bitsandbytes, LLM",
                          r"l\.weight .*l\.SCB"),
    "NF4": (tensors(l__weight=U8, l__weight__absmax=U8, l__weight__quant_state__bitsandbytes__nf4=U8) |
            {"l.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=U8)}, "bitsandbytes, NF4",
            r"l\.weight .*l\.weight\.quant_state\.bitsandbytes__nf4"),
    "FP4": (tensors(l__weight=U8) | {"l.weight.quant_state.bitsandbytes__fp4": torch.ones(3, dtype=U8)},
            "bitsandbytes, FP4", r"l\.weight "),
    "4 bits": (tensors(l__weight=U8, l__weight__absmax=torch.float32), "bitsandbytes, 4 bits", r"l\.weight\.absmax"),
    "HQQ": (tensors(l__W_q=U8, l__scale=torch.half, l__zero=torch.half), "HQQ", r"l\.W_q .*l\.scale"),
    "torchao": (tensors(l___weight_qdata=I8, l___weight_scale=torch.float32), "torchao", r"l\._weight_qdata"),
    "torchao FP8": (tensors(l___weight_qdata=F8, l___weight_scale=torch.float32), "torchao", r"l\._weight_qdata"),
    "quanto": (tensors(l__weight___data=I8, l__weight___scale=torch.float32), "quanto", r"l\.weight\._data"),
    "quanto, 4 bits": (
        tensors(l__weight___data___data=U8, l__weight___scale=torch.half, l__weight___shift=torch.half),
        "quanto, 4 or 2 bits", r"l\.weight\._data\._data",
    ),
    "unknown codes": (tensors(l__weight=torch.int16, l__weight_scale=torch.half), "codes with scales", r"l\.weight "),
    "unknown inverses": (tensors(l__weight=I8, l__weight_scale_inv=torch.float32), "codes with scales", r"l\.weight "),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["mapping", "file", "model"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_unreadable_format_is_refused_by_name_with_the_tensors_that_show_it(tmp_path, name, kind):
    state, format, beside = FORMATS[name]
    state = {"other.weight": torch.rand(32, 32)} | state
    source = state
    if kind == "file":
        source = tmp_path / "in"
        safetensors.torch.save_file(state, source)
    if kind == "model":
        source = model_of(state)
    with pytest.raises(SourceError, match=beside) as refused:
        fewbits.plan(source, "int8")
    assert "is quantized already" in str(refused.value)
    assert f"it looks like {format}" in str(refused.value)
    assert "give the float checkpoint it was made from" in str(refused.value)


def model_of(state):
    """A model with parameters of these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not isinstance(getattr(module, part, None), nn.Module):
                module._modules[part] = nn.Module()
            module = module._modules[part]
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    return root


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_a_model_with_fp8_weights_is_refused(suffix):
    model = model_of({"l.weight": codes((8, 16)), f"l.weight{suffix}": scales(()), "o.weight": torch.rand(32, 32)})
    with pytest.raises(SourceError, match=r"l\.weight is quantized already, in float8_e4m3fn.*its checkpoint or state"):
        fewbits.plan(model, "int8")
    assert fewbits.plan(model.state_dict(), "int8").ledger.count("merged") == 1


@pytest.mark.parametrize(
    "state",
    [
        tensors(l__xqweight=I32, l__scales=torch.float32),
        tensors(l__qweight=I32),
        tensors(l__qweight=torch.float32, l__scales=torch.float32),
        tensors(l__weight=torch.float32, l__weight_scale=torch.float32),
        tensors(l__logit_scale=torch.float32, l__logit=torch.float32),
        tensors(l__weight_packed=torch.float32, l__weight_scale=torch.float32),
        tensors(l__ids=torch.int64, m__ids_scale=torch.float32),
        tensors(l__weight=torch.float32, l__SCB=torch.float32),
        tensors(l__weight=F8),
        tensors(l__logit_scale_inv=torch.float32),
    ],
    ids=lambda state: " ".join(state),
)
def test_matching_names_with_other_dtypes_are_not_taken_for_another_tool(state):
    state |= {"other.weight": torch.rand(32, 32)}
    ledger = quantize_small(state, "int8").ledger
    assert {row.name for row in ledger} == state.keys()
    assert ledger.count("merged") == 0


def test_results_of_fewbits_are_not_quantized_again(tmp_path):
    result = quantize_small({"l.weight": torch.rand(32, 32)}, "int8")
    result.save(tmp_path / "file")
    result.save(tmp_path / "folder", max_shard_size=1)
    plain = safetensors.torch.load_file(tmp_path / "file")
    for source in (tmp_path / "file", tmp_path / "folder", result.model, plain):
        with pytest.raises(SourceError, match="quantized already"):
            fewbits.plan(source, "int8")
