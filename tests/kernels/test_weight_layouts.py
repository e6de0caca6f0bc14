"""Weight layouts of any size give the canonical words back, and hold codes in the order of torch's kernels."""

import attrs
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fewbits import QuantSpec
from fewbits.extend import Layout
from fewbits.kernels import features, weight_layouts
from fewbits.kernels.byte_pairs import BytePairs
from fewbits.kernels.int4_tiles import TABLE_GROUPS, Int4Tiles, table_group
from fewbits.kernels.int8_rows import Int8Rows, PlainInt8
from fewbits.kernels.weight_layouts import PackedInt32
from fewbits.numerics.levels import E2M1
from fewbits.numerics.quantize import quantize
from fewbits.numerics.tensor import same_bits
from fewbits.testing.kernel_outputs import decoded
from kernels.kernel_cases import FLOAT8, INT4, NF4, NF4_LEVELS, any_words, curved

CHANNEL4, CHANNEL8 = (QuantSpec(bits=bits, granularity="channel") for bits in (4, 8))
SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 130, 257])
GROUPS = st.sampled_from([32, 33, 40, 64, 128, 256, 1000])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def weights(draw, bits, levels=None):
    """A weight in the canonical layout, of any size and with any codes."""
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    spec = QuantSpec(
        bits=bits,
        granularity=granularity,
        group_size=draw(GROUPS) if granularity == "group" else None,
        symmetric=levels is not None or draw(st.booleans()),
        scale_dtype=draw(DTYPES),
        levels=levels,
    )
    return any_words(spec, draw(SIZES), draw(SIZES), seed=draw(st.integers(0, 1000)))


@pytest.fixture(params=features.WIDTHS)
def tile_width(request, monkeypatch):
    """Tiles of both widths, on every CPU."""
    monkeypatch.setattr(features, "tile_width", lambda: request.param)
    return request.param


def read_alike(layout, words):
    rows, dtype = words.layout.rows, words.scale.dtype
    assert layout.value(dtype).equal(words.value(dtype))
    assert same_bits(layout.words(), words.words())
    wheres = [slice(None), slice(rows // 3, rows // 2 + 1), slice(rows - 1, rows), torch.arange(rows).flip(0)]
    for where in [*wheres, torch.tensor([0, rows - 1, 0]), torch.tensor([], dtype=torch.long)]:
        assert same_bits(layout.codes(where), words.codes(where))
        assert same_bits(layout.decoded(where), words.decoded(where))
    for target in (torch.float32, torch.float16, torch.float64):
        assert same_bits(layout.dequantize(target), words.dequantize(target))
    assert same_bits(layout.centered_codes(), words.centered_codes())


@given(weights(8))
def test_bytes_give_back_what_they_were_made_of(words):
    layout = Int8Rows.of(words)
    read_alike(layout, words)
    read_alike(PackedInt32.of(layout), words)


@given(weights(8))
def test_plain_bytes_give_back_what_they_were_made_of(words):
    assume(PlainInt8.refuses(words) is None)
    layout = PlainInt8.of(words)
    assert layout.signed_bytes.nbytes == words.layout.rows * words.layout.columns
    read_alike(layout, words)
    read_alike(PackedInt32.of(layout), words)
    read_alike(PlainInt8.of(Int8Rows.of(words)), words)


LEVELS = [(2, curved(2)), (3, curved(3)), (4, NF4_LEVELS), (4, E2M1), (5, curved(5)), (8, curved(8))]


@given(st.one_of(*map(weights, range(2, 8)), *(weights(*one) for one in LEVELS)))
def test_tiles_give_back_what_they_were_made_of(words):
    assume(Int4Tiles.refuses(words) is None)
    layout = Int4Tiles.of(words)
    read_alike(layout, words)
    read_alike(PackedInt32.of(layout), words)


@given(st.sampled_from([curved(8), FLOAT8.levels]).flatmap(lambda levels: weights(8, levels)))
def test_pairs_of_bytes_give_back_what_they_were_made_of(words):
    assume(BytePairs.refuses(words) is None)
    layout = BytePairs.of(words)
    read_alike(layout, words)
    read_alike(PackedInt32.of(layout), words)


@pytest.mark.parametrize("sizes", [(64, 64), (65, 96), (129, 257), (40, 40), (33, 33), (200, 130)], ids=str)
@pytest.mark.parametrize("spec", [INT4, attrs.evolve(INT4, symmetric=False), attrs.evolve(INT4, bits=6), NF4], ids=str)
def test_tiles_of_both_widths_give_back_what_they_were_made_of(sizes, spec, tile_width):
    words = any_words(spec, *sizes)
    layout = Int4Tiles.of(words)
    assert layout.width == tile_width
    read_alike(layout, words)


@given(weights(8))
def test_bytes_are_signed_codes_filled_up_with_zeros(words):
    layout, columns = Int8Rows.of(words), words.layout.columns
    assert layout.signed.dtype == torch.int8
    assert layout.signed.shape == (words.layout.rows, -(-columns // 16) * 16)
    assert torch.equal(layout.signed[:, :columns], words.value(torch.float32).codes())
    assert not layout.signed[:, columns:].any()
    assert layout.signed.is_contiguous()


@given(weights(4))
def test_tiles_lie_as_torch_packs_them(words):
    assume(Int4Tiles.refuses(words) is None)
    layout = Int4Tiles.of(words)
    count, wide, half = layout.tiles.shape
    rows, columns = words.layout.matrix_shape
    codes = torch.full((count * 2 * half, wide), 8, dtype=torch.int32)
    codes[:rows, :columns] = words.codes(slice(None)).int()
    if half * 2 == features.tile_width():
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        assert torch.equal(layout.tiles.flatten(), packed.flatten())
    low, high = (layout.tiles & 15).int(), (layout.tiles >> 4).int()
    assert torch.equal(torch.stack([low, high], 1).permute(0, 1, 3, 2).reshape(codes.shape), codes)


@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(weights(4))
def test_the_table_of_tiles_holds_scales_and_what_code_8_stands_for(words):
    assume(Int4Tiles.refuses(words) is None)
    layout = Int4Tiles.of(words)
    rows, columns = words.layout.matrix_shape
    groups = layout.table.shape[0]
    assert layout.group in TABLE_GROUPS
    assert not layout.table[:, rows:].any()
    middle = decoded(words, torch.full((rows, columns), 8, dtype=torch.uint8))
    above = decoded(words, torch.full((rows, columns), 9, dtype=torch.uint8))
    for group in range(groups):
        column = min(group * layout.group, columns - 1)
        scales = (above - middle)[:, column]
        torch.testing.assert_close(layout.table[group, :rows, 0].double(), scales, rtol=2**-8, atol=0)
        torch.testing.assert_close(layout.table[group, :rows, 1].double(), middle[:, column], rtol=2**-8, atol=0)
        last = min((group + 1) * layout.group, columns) - 1
        # Columns that share an entry of the table share a scale.
        assert torch.equal(above[:, column], above[:, last])


@given(st.one_of(weights(3), weights(4), weights(6), weights(4, NF4_LEVELS)))
def test_padding_at_most_doubles_the_memory_of_tiles(words):
    reason = Int4Tiles.refuses(words)
    rows, columns = words.layout.matrix_shape
    if reason is None:
        layout = Int4Tiles.of(words)
        assert layout.tiles.numel() <= layout.planes * rows * columns
    elif "twice the memory" in reason:
        layout = Int4Tiles.of(words)
        assert layout.tiles.numel() > layout.planes * rows * columns


@pytest.mark.parametrize(
    ("width", "columns", "group"),
    [(128, 4096, 128), (64, 4096, 64), (32, 4096, 32), (256, 4096, 256), (512, 4096, 256), (96, 960, 32)],
)
def test_groups_of_the_table_are_the_widest_that_fit(width, columns, group):
    spec = QuantSpec(bits=4, granularity="group", group_size=width)
    assert table_group(spec, columns) == group


@pytest.mark.parametrize(("layout", "bits"), [(Int8Rows, 8), (Int4Tiles, 4)])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 256), (192, 64), (128, 130), (100, 128), (65, 96)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_that_nobody_else_has_may_be_written_over(layout, bits, sizes, symmetric):
    spec = QuantSpec(bits=bits, granularity="group", group_size=64, symmetric=symmetric)
    words = any_words(spec, *sizes)
    own = attrs.evolve(words, packed=words.packed.clone())
    where = own.packed.data_ptr()
    made = layout.of(own, reuse_memory=True)
    read_alike(made, words)
    held = made.tensors()[layout.data[0]]
    assert (held.data_ptr() == where) == (held.nbytes == words.packed.nbytes)
    kept = layout.of(words)
    assert kept.tensors()[layout.data[0]].data_ptr() != words.packed.data_ptr()
    read_alike(kept, words)


@pytest.mark.parametrize("sizes", [(64, 64), (100, 4), (100, 9), (0, 16), (16, 0), (1, 1)], ids=str)
def test_plain_bytes_take_the_memory_of_words_if_they_are_as_many(sizes):
    words = any_words(CHANNEL8, *sizes)
    own = attrs.evolve(words, packed=words.packed.clone())
    layout = PlainInt8.of(own, reuse_memory=True)
    assert layout.value(torch.float32).equal(words.value(torch.float32))
    same_size = layout.signed_bytes.nbytes == words.packed.nbytes
    assert (layout.signed_bytes.data_ptr() == own.packed.data_ptr()) == same_size
    assert PlainInt8.of(words).signed_bytes.equal(layout.signed_bytes)


def test_a_layout_that_is_there_is_not_made_again():
    words = any_words(QuantSpec(bits=8, granularity="channel"), 20, 30)
    assert PackedInt32.of(words).packed is words.packed
    assert all(
        PackedInt32.of_value(words.value(torch.float32)).tensors()[name] is t for name, t in words.tensors().items()
    )
    layout = Int8Rows.of(words)
    assert layout.scale is words.scale


def other_device(spec):
    words = any_words(spec, 64, 64)
    return attrs.evolve(words, **{name: tensor.to("meta") for name, tensor in words.tensors().items()})


def of_another_cut(spec):
    value = quantize(torch.ones(64, 64), spec, layout=Layout.of((64, 64), inputs=(0,)))
    return PackedInt32.of_value(value)


@pytest.mark.parametrize(
    ("layout", "words", "why"),
    [
        (Int8Rows, any_words(CHANNEL4, 64, 64), "codes of 4 bits, not 8"),
        (Int4Tiles, any_words(CHANNEL8, 64, 64), "too coarse for integers of 8 bits"),
        (BytePairs, any_words(CHANNEL8, 64, 64), "not indices of levels of 8 bits"),
        (BytePairs, any_words(attrs.evolve(FLOAT8, granularity="group", group_size=32), 64, 64), "scales for groups"),
        (BytePairs, any_words(FLOAT8, 64, 7), "more than twice the memory"),
        (BytePairs, other_device(FLOAT8), "on meta, not on the CPU"),
        (Int8Rows, other_device(CHANNEL8), "on meta, not on the CPU"),
        (Int4Tiles, other_device(CHANNEL4), "on meta, not on the CPU"),
        (PlainInt8, other_device(CHANNEL8), "on meta, not on the CPU"),
        (PlainInt8, any_words(CHANNEL4, 64, 64), "not symmetric integers of 8 bits"),
        (PlainInt8, any_words(attrs.evolve(CHANNEL8, symmetric=False), 64, 64), "not symmetric integers of 8 bits"),
        (PlainInt8, any_words(FLOAT8, 64, 64), "not symmetric integers of 8 bits"),
        (Int8Rows, of_another_cut(CHANNEL8), "not a matrix of outputs by inputs"),
        (Int4Tiles, of_another_cut(CHANNEL4), "not a matrix of outputs by inputs"),
        (Int8Rows, any_words(CHANNEL8, 64, 64, dtype=torch.float64), "float64 scales"),
        (Int4Tiles, any_words(CHANNEL4, 64, 64, dtype=torch.float64), "float64 scales"),
        (Int4Tiles, any_words(QuantSpec(bits=4, granularity="group", group_size=40), 64, 80), "not a multiple of 32"),
        (Int4Tiles, any_words(CHANNEL4, 3, 3), "more than twice the memory"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_a_reason(layout, words, why):
    assert why in layout.refuses(words)
    assert PackedInt32.refuses(words) is None


def test_without_torch_s_kernel_there_are_no_tiles(monkeypatch):
    monkeypatch.setattr(features, "tile_width", lambda: None)
    assert Int4Tiles.refuses(any_words(CHANNEL4, 64, 64)) == features.NO_TILES


@pytest.mark.parametrize(
    ("layout", "bits"), [(PackedInt32, 8), (PackedInt32, 4), (Int8Rows, 8), (PlainInt8, 8), (Int4Tiles, 4)]
)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("row", [-1, 100, 110, 127, 128, 1000])
def test_a_row_that_is_not_there_is_not_read(layout, bits, granularity, row):
    words = any_words(QuantSpec(bits=bits, granularity=granularity), 100, 64)
    with pytest.raises(IndexError):
        layout.of(words).decoded(torch.tensor([3, row]))


def test_every_layout_has_a_name_and_says_what_it_holds():
    assert {"packed_int32", "int8_rows", "int4_tiles"} <= weight_layouts.WEIGHT_LAYOUTS.keys()  # tests add others
    for layout in weight_layouts.WEIGHT_LAYOUTS.values():
        assert set(layout.data) <= {field.name for field in attrs.fields(layout)}
