"""8-bit floats with one scale for each block of 128 rows and 128 columns."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.numerics.levels import E4M3
from fewbits.schemes import FP8Blocks, FP8PerChannel


def scheme(observer=None, **settings) -> FP8Blocks:
    selector = fewbits.LayerSelector(min_elements=1, **settings)
    return FP8Blocks(observer=observer, selector=selector, ragged="shorter")


def blocks_of(scale: torch.Tensor) -> list[torch.Tensor]:
    """The scales of each block, one group of one block of rows at a time."""
    return [column for rows in scale.split(128) for column in rows.unbind(1)]


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    observer=st.sampled_from([None, "mse"]),
    seed=st.integers(0, 2**16),
)
def test_all_rows_of_a_block_have_one_scale_and_the_bound_holds(rows, columns, dtype, observer, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, rows)[torch.randperm(rows, generator=generator)].unsqueeze(1)
    weight = (torch.randn(rows, columns, generator=generator) * sizes).to(dtype)
    result = fewbits.quantize({"w": weight}, scheme(observer))
    assert result.report.ok
    assert result.report.tensors[0].measurement.worst_bound_ratio <= 1
    scale = result.model["w"].scale
    assert scale.shape == (rows, -(-columns // 128))
    assert all(len(block.unique()) == 1 for block in blocks_of(scale))


def test_the_scale_of_a_block_is_its_largest_magnitude_over_448():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    found = fewbits.quantize({"w": weight}, scheme()).model["w"]
    for start in (0, 128):
        for group in range(3):
            block = weight[start : start + 128, 128 * group : 128 * group + 128]
            assert float(found.scale[start, group]) == float((block.abs().max().double() / max(E4M3)).float())


def test_blocks_and_rows_of_one_size_have_the_same_codes():
    weight = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    blocks = fewbits.quantize({"w": weight}, scheme()).model["w"]
    rows = fewbits.quantize({"w": weight}, FP8PerChannel(selector=fewbits.LayerSelector(min_elements=1))).model["w"]
    assert torch.equal(blocks.dequantize(), rows.dequantize())


def test_a_file_has_the_blocks_of_the_tensor_in_memory(tmp_path):
    weight = torch.randn(700, 260, generator=torch.Generator().manual_seed(0))
    torch.save({"w": weight}, tmp_path / "in.pt")
    fewbits.quantize(tmp_path / "in.pt", scheme(), output=fewbits.Output(tmp_path / "out.safetensors", threads=2))
    found = fewbits.load(tmp_path / "out.safetensors")["w"]
    expected = fewbits.quantize({"w": weight}, scheme()).model["w"]
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scale, expected.scale)


def test_a_rule_for_another_scheme_gives_that_scheme():
    weights = {"a": torch.randn(256, 256), "b": torch.randn(256, 256)}
    found = fewbits.quantize(weights, scheme(overrides={"b": "int4"})).model["b"]
    expected = fewbits.quantize({"b": weights["b"]}, "int4", min_elements=1).model["b"]
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.packed, expected.packed)


def test_the_stored_bits_are_those_of_groups_of_128():
    ledger = fewbits.quantize({"w": torch.randn(256, 256, dtype=torch.float16)}, FP8Blocks()).ledger
    shape = 16  # bytes
    assert (ledger["w"].bytes_after - shape) * 8 == 256 * 256 * (8 + 16 / 128)
