"""`max_memory`: conversions stay within the limit or are refused, and processes run under an enforced limit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.conversion.budget import Budget, Demand, choose_budget
from fewbits.errors import ArgumentError
from support.fp8 import codes, scales
from support.lifecycle_helpers import quantize_small

MB = 10**6
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")


@pytest.fixture
def source(tmp_path):
    tensors = {"a.weight": torch.rand(64, 300), "b.weight": torch.rand(40, 40), "c": torch.rand(5000)}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    return tmp_path / "in"


def demand(source, scheme="int8", **options):
    """The memory demand of a source with tensors of gigabytes. Only the header of the file exists."""
    named = isinstance(scheme, str)
    quantizer = fewbits.QuantizationConfig(scheme=scheme).quantizer() if named else scheme
    quantizer.prepare(source)
    observers = {row.name: fewbits.MinMaxObserver() for row in quantizer.ledger if row.fate == "quantized"}
    return Demand(quantizer.ledger, observers | options.pop("observers", {}), options.pop("by_rows", True), True)


@pytest.fixture
def large(tmp_path):
    """A checkpoint of 40 GB: a header, and a sparse file."""
    shapes = {"embed.weight": (128_000, 8192), "up.weight": (28_672, 8192), "conv.weight": (1 << 12, 1 << 10, 3, 3)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "large", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return tmp_path / "large"


def test_without_a_limit_chunks_and_threads_keep_their_defaults(large):
    assert choose_budget(demand(large), fewbits.Output("out"), 16) == Budget(16, 1 << 22)


@pytest.mark.parametrize("limit", [192, 200, 300, 500, 1000])
@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4", "fp16"])
def test_a_limit_makes_chunks_smaller_and_then_threads_fewer(large, scheme, limit):
    needs = demand(large, scheme)
    budget = choose_budget(needs, fewbits.Output("out", max_memory=limit * MB), 8)
    assert needs.total(budget) <= limit * MB
    assert 1 <= budget.threads <= 8
    if budget.threads < 8:  # one more thread would exceed the limit even with the smallest chunks
        assert needs.total(Budget(budget.threads + 1, 1 << 18)) > limit * MB
    elif budget.chunk_elements < 1 << 22:
        assert needs.total(Budget(8, 2 * budget.chunk_elements)) > limit * MB


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({"by_rows": False}, "int8"),
        ({"observers": {"embed.weight": fewbits.MSEObserver()}}, "int8-tensor"),
        ({}, fewbits.Int8PerChannel(selector=fewbits.LayerSelector(input_axes={"embed.weight": 0}))),
    ],
    ids=["custom", "observer", "axes"],
)
def test_a_weight_that_must_be_in_memory_as_a_whole_is_refused_with_the_smallest_possible_limit(large, options, scheme):
    needs = demand(large, scheme, **options)
    with pytest.raises(ArgumentError, match=r"embed\.weight.*must be in memory as a whole") as refused:
        choose_budget(needs, fewbits.Output("out", max_memory="1GB"), 4)
    least = int(re.search(r"at least ([\d,]+)", str(refused.value))[1].replace(",", ""))
    assert least > 2 * 128_000 * 8192
    assert choose_budget(needs, fewbits.Output("out", max_memory=least), 4).threads == 1


def test_a_tensor_that_is_not_contiguous_in_its_file_counts_as_a_whole(tmp_path):
    torch.save({"t.weight": torch.zeros(8000, 4000).t(), "b.weight": torch.zeros(64, 64)}, tmp_path / "in.bin")
    output = fewbits.Output(tmp_path / "out", max_memory="200MB")
    for act in (fewbits.plan, fewbits.quantize):
        with pytest.raises(ArgumentError, match=r"on t\.weight.*memory as a whole; raise the limit$") as refused:
            act(tmp_path / "in.bin", "int8", output=output)
    least = int(re.search(r"at least ([\d,]+)", str(refused.value))[1].replace(",", ""))
    assert least > 2 * 4 * 8000 * 4000
    assert fewbits.plan(tmp_path / "in.bin", "int8", output=fewbits.Output(tmp_path / "out", max_memory=least)).shards


def test_a_limit_that_is_too_small_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ArgumentError, match=r"max_memory is 1,000,000 bytes, and at least [\d,]+ are needed"):
        quantize_small(source, "int8", output=fewbits.Output(tmp_path / "out", max_memory="1MB"))
    with pytest.raises(ArgumentError, match=r"raise the limit$"):  # the next tensor needs as much
        fewbits.plan(source, "int8", output=fewbits.Output(tmp_path / "out", max_memory="1MB"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("limit", ["192MB", "1GB"])
def test_a_limit_changes_nothing_in_the_result(source, tmp_path, limit):
    quantize_small(source, "int4", output=tmp_path / "free")
    quantize_small(source, "int4", output=fewbits.Output(tmp_path / "bound", max_memory=limit))
    assert (tmp_path / "bound").read_bytes() == (tmp_path / "free").read_bytes()


@pytest.mark.parametrize("limit", [0, -1, "much", 1.5])
def test_an_invalid_limit_is_refused(limit):
    with pytest.raises(ArgumentError, match="max_memory must be"):
        fewbits.Output("out", max_memory=limit)


HELD = """if True:
    import json, resource, sys
    import fewbits

    def status():
        lines = open("/proc/self/status").read().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}

    source, output, scheme, limit, threads = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
    before = status()
    resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + limit,) * 2)
    written = fewbits.Output(output, max_memory=limit, threads=threads)
    report = fewbits.quantize(source, scheme, output=written, on_failure="ignore").report
    print(json.dumps({"rise": status()["VmHWM"] - before["VmHWM"], "failures": report.failures[:3]}))
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "threads"), [(192 * MB, 1), (224 * MB, 2), (512 * MB, 4)])
@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4", "fp16"])
def test_a_process_stays_within_the_limit(tmp_path, scheme, limit, threads):
    """Quantize 256 MB, in one tensor or many. Exceeding the limit kills the process."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"large.weight": torch.randn(24_000, 4096, generator=generator).bfloat16()}
    tensors |= {f"layers.{i}.weight": torch.randn(512, 512, generator=generator) for i in range(64)}
    hold_to_limit(tmp_path, tensors, scheme, limit, threads)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "threads"), [(192 * MB, 1), (512 * MB, 4)])
@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "fp16"])
def test_a_process_that_dequantizes_stays_within_the_limit(tmp_path, scheme, limit, threads):
    """Quantize blocks, and the worst case: rows of two elements, each with a scale."""
    tensors = {"large.weight": codes((24_000, 4096)), "large.weight_scale_inv": scales((188, 32))}
    tensors |= {"rows.weight": codes((10_000_000, 2)), "rows.weight_scale": scales((10_000_000, 1))}
    hold_to_limit(tmp_path, tensors, scheme, limit, threads)


def hold_to_limit(tmp_path, tensors, scheme, limit, threads):
    safetensors.torch.save_file(tensors, tmp_path / "in")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), scheme, str(limit), str(threads)]
    done = subprocess.run([sys.executable, "-c", HELD, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["rise"] <= limit
    assert found["failures"] == []
