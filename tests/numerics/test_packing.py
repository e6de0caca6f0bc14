"""Dense bitstreams of 2 to 8 bits in int32 words."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fewbits.numerics.packing import pack, packed_words, unpack
from support.strategies import seeds

widths = st.integers(2, 8)


@st.composite
def codes_and_bits(draw):
    bits = draw(widths)
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(seeds))
    top = draw(st.sampled_from([1, 2, 1 << bits]))
    return (1 << bits) - 1 - torch.randint(top, (rows, columns), generator=generator, dtype=torch.uint8), bits


def words_of(row: list[int], bits: int) -> list[int]:
    """Compute the words of one row from one large integer."""
    stream = sum(code << (index * bits) for index, code in enumerate(row))
    size = 4 * -(-len(row) * bits // 32)
    data = stream.to_bytes(size, "little")
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, size, 4)]


@given(codes_and_bits())
@example((torch.empty(0, 1, dtype=torch.uint8), 4))
def test_unpack_undoes_pack(case):
    codes, bits = case
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


@given(codes_and_bits())
def test_words_are_a_little_endian_bitstream_padded_with_zeros(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words_of(row, bits) for row in codes.tolist()]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_length_has_the_words_it_needs_and_no_more(bits):
    for columns in range(130):
        codes = torch.full((2, columns), (1 << bits) - 1, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (2, packed_words(columns, bits))
        assert 0 <= 32 * packed.shape[1] - columns * bits < 32
        assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_at_every_place_of_a_unit(bits):
    row = torch.arange(1 << bits, dtype=torch.uint8)
    codes = torch.stack([row.roll(shift) for shift in range(8)])
    assert torch.equal(unpack(pack(codes, bits), bits, len(row)), codes)


@pytest.mark.parametrize(
    ("bits", "row", "words"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321 - 2**32]),
        (8, [0x78, 0x56, 0x34, 0x12, 0xFF], [0x12345678, 0xFF]),
        (2, [3, 2, 1, 0], [0b00_01_10_11]),
        (3, [0] * 10 + [0b111, 0], [0b11 << 30, 0b1]),
        (5, [0] * 6 + [0b10110], [0b10 << 30, 0b101]),
    ],
)
def test_known_words(bits, row, words):
    packed = pack(torch.tensor([row], dtype=torch.uint8), bits)
    assert [word % 2**32 for word in packed[0].tolist()] == [word % 2**32 for word in words]


@given(codes_and_bits())
def test_packing_reads_its_input_and_any_strides(case):
    codes, bits = case
    strided = codes.T.contiguous().T
    before = strided.clone()
    assert torch.equal(pack(strided, bits), pack(codes, bits))
    assert torch.equal(strided, before)


@pytest.mark.parametrize("columns", [3, 4, 37])
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_takes_any_strides(bits, columns):
    codes = (torch.arange(5 * columns) % (1 << bits)).to(torch.uint8).reshape(5, columns)
    packed = pack(codes, bits)
    column_major = packed.T.contiguous().T
    wider = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    repeated = packed[:1].expand(5, -1)
    assert torch.equal(unpack(column_major, bits, columns), codes)
    assert torch.equal(unpack(wider, bits, columns), codes)
    assert torch.equal(unpack(packed[2:4], bits, columns), codes[2:4])
    assert torch.equal(unpack(repeated, bits, columns), codes[:1].expand(5, -1))
