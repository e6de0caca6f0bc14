"""The features of a CPU are tried once; a kernel that lacks one says so."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fewbits.kernels import features
from fewbits.kernels.choose import KERNELS
from kernels.kernel_cases import BY_NAME, INT4, INT8, any_words

PROBES = [
    features.tile_width,
    features.has_int8pack,
    features.int_mm_is_exact,
    features.convolution_is_exact,
    features.has_bf16,
    features.has_vnni,
]
TESTS = Path(__file__).parents[1]


@pytest.fixture
def forgotten():
    """Probes are asked anew, and again afterwards."""

    def forget():
        for probe in PROBES:
            getattr(probe, "cache_clear", lambda: None)()

    forget()
    yield
    forget()


def answers():
    return [probe() for probe in PROBES]


@pytest.mark.parametrize(
    "environment",
    [
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.float16),
        lambda: torch._subclasses.FakeTensorMode(),
    ],
    ids=["meta", "inference", "no grad", "bfloat16", "float16", "fake"],
)
def test_the_first_to_ask_does_not_matter(environment, forgotten):
    expected = answers()
    for probe in PROBES:
        getattr(probe, "cache_clear", lambda: None)()
    with environment():
        found = answers()
    assert found == expected
    assert answers() == expected


def test_the_default_dtype_does_not_matter(forgotten):
    expected = answers()
    for probe in PROBES:
        getattr(probe, "cache_clear", lambda: None)()
    torch.set_default_dtype(torch.float64)
    try:
        assert answers() == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("off", [0.0, 1e-7, 1.0])
def test_a_float32_convolution_that_is_off_by_a_little_is_noticed(monkeypatch, forgotten, off):
    original = torch.nn.functional.conv2d

    def convolve(x, *rest, **options):
        output = original(x.double(), *(tensor.double() for tensor in rest), **options)
        return output if x.dtype == torch.float64 else (output * (1 + off)).float()

    monkeypatch.setattr(torch.nn.functional, "conv2d", convolve)
    assert features.convolution_is_exact() is (off == 0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_weight_int8pack_mm", lambda x, w, s: torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype)),
        ("_weight_int8pack_mm", None),
        ("_int_mm", lambda x, w: (x.int() @ w.int()).clamp(-(2**15), 2**15 - 1)),
        ("_int_mm", None),
    ],
)
def test_a_torch_that_lacks_a_product_or_has_a_wrong_one_goes_without(name, wrong, monkeypatch, forgotten):
    if wrong is None:
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, wrong)
    kernel = BY_NAME["int8pack_mm" if "pack" in name else "int_mm"]
    reason = features.NO_BYTES if "pack" in name else features.INEXACT
    assert kernel.supports(any_words(INT8, 128, 64)) == reason


def test_a_torch_that_reads_tiles_in_another_order_goes_without(monkeypatch, forgotten):
    monkeypatch.setattr(features, "WIDTHS", (16,))
    assert features.tile_width() is None
    assert BY_NAME["int4pack_mm"].supports(any_words(INT4, 64, 64)) == features.NO_TILES


def test_a_torch_that_does_not_tell_capabilities_goes_without(monkeypatch, forgotten):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not features.has_vnni()
    assert not features.has_bf16()
    assert BY_NAME["int_mm"].supports(any_words(INT8, 64, 64)) is not None


CHILD = """
import json, sys
import pytest, torch
sys.path.insert(0, {tests!r})
from fewbits.kernels import features
from fewbits.kernels.choose import KERNELS
from fewbits.testing import check_kernel
from kernels.kernel_cases import INT4, INT8, any_words

codes = torch.full((16, 256), -128, dtype=torch.int8)
x = torch.full((4, 256), 127, dtype=torch.int8)
found = {{
    "capability": torch.backends.cpu.get_cpu_capability(),
    "int_mm_is_exact": features.int_mm_is_exact(),
    "really": bool((torch._int_mm(x, codes.t()) == -128 * 127 * 256).all()),
    "bf16": bool(features.has_bf16()),
    "width": features.tile_width(),
    "refused": {{k.name: [k.supports(any_words(spec, 64, 256)) for spec in (INT8, INT4)] for k in KERNELS}},
    "failed": {{}},
}}
for kernel in KERNELS:
    if None in found["refused"][kernel.name]:
        for check in check_kernel(kernel, max_examples=3):
            try:
                check()
            except Exception as error:
                found["failed"][f"{{kernel.name}} {{check}}"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_with_avx2_alone_every_kernel_that_says_so_is_right():
    """In a process that sees no more than AVX2, where pairs of products of bytes may saturate."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = textwrap.dedent(CHILD).format(tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["capability"] == "AVX2"
    assert found["failed"] == {}
    able = {name for name, reasons in found["refused"].items() if None in reasons}
    assert able >= {"byte_blocks", "float_sums", "word_blocks", "reference"}
    assert found["int_mm_is_exact"] == found["really"]
    for name in () if found["really"] else ("int_mm", "tile_int_mm"):
        assert features.INEXACT in found["refused"][name]
    assert found["width"] in (32, None)
    assert not found["bf16"]


def test_all_kernels_have_been_asked():
    assert set(BY_NAME) == {kernel.name for kernel in KERNELS}
