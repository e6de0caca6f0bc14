"""Damage and forgery: every changed file ends in a CheckpointError, at once."""

import json
import math
import struct

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits.errors import FormatError
from fewbits.numerics.levels import E2M1, E4M3
from fewbits.numerics.packing import pack, unpack
from fewbits.sources.open import open_source
from fewbits.validation.verify import verify
from support.checkpoints import AnyScheme, forged, forged_ledger, forged_tensor, joined, save, sign, split, state


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "file.safetensors"


@pytest.fixture(scope="module")
def genuine(scratch):
    """A file with symmetric and asymmetric codes, kept tensors, and two names for one storage."""
    save(scratch, state(), AnyScheme(fewbits.QuantSpec(4, "group", group_size=64, symmetric=False)))
    return scratch.read_bytes()


def sources_of_bytes(data):
    """The source tensor that each tensor of the file belongs to, with its first and last byte."""
    header, payload = split(data)
    names = sorted(state(), key=len, reverse=True)
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (len(data) - len(payload) + offset for offset in entry["data_offsets"])
            yield next(source for source in names if name in (source, *parts_of(source))), name, start, stop


def parts_of(name):
    return [f"{name}_{part}" for part in ("packed", "scale", "zero_point", "shape")]


@given(st.data())
def test_any_flipped_bit_of_the_payload_is_found_and_its_tensor_named(scratch, genuine, data):
    source, name, start, stop = data.draw(st.sampled_from(list(sources_of_bytes(genuine))))
    damaged = bytearray(genuine)
    damaged[data.draw(st.integers(start, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(damaged)
    with pytest.raises(fewbits.errors.DigestError, match=f" {name} "):
        fewbits.load(scratch)
    report = verify(scratch)
    assert not report.ok
    assert [tensor.name for tensor in report.tensors if tensor.failures] == [source]


@given(st.data())
def test_any_flipped_bit_of_the_header_is_found(scratch, genuine, data):
    damaged = bytearray(genuine)
    end = 8 + int.from_bytes(genuine[:8], "little")
    damaged[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(damaged)
    with pytest.raises(fewbits.errors.CheckpointError):
        fewbits.load(scratch)


@pytest.mark.parametrize("step", [1, 7])
def test_every_damaged_tensor_is_named(scratch, genuine, step):
    damaged, expected = bytearray(genuine), []
    for _, name, start, _ in list(sources_of_bytes(genuine))[::step]:
        damaged[start] ^= 1
        expected.append(name)
    scratch.write_bytes(damaged)
    with pytest.raises(fewbits.errors.DigestError) as caught:
        fewbits.load(scratch)
    assert all(name in str(caught.value) for name in expected)


@given(st.data())
def test_a_truncated_file_is_refused(scratch, genuine, data):
    scratch.write_bytes(genuine[: data.draw(st.integers(0, len(genuine) - 1))])
    for check in ("digests", "header"):
        with pytest.raises(fewbits.errors.FormatError):
            fewbits.load(scratch, check=check)


@given(st.binary(min_size=1, max_size=100))
def test_a_file_with_something_appended_is_refused(scratch, genuine, more):
    scratch.write_bytes(genuine + more)
    for check in ("digests", "header"):
        with pytest.raises(fewbits.errors.FormatError):
            fewbits.load(scratch, check=check)


@given(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 7, 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]))
def test_a_header_length_that_lies_is_refused(scratch, genuine, length):
    if length == int.from_bytes(genuine[:8], "little"):
        length += 1
    scratch.write_bytes(length.to_bytes(8, "little") + genuine[8:])
    with pytest.raises(fewbits.errors.FormatError):
        fewbits.load(scratch)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(scratch, data):
    for content in (data, len(data).to_bytes(8, "little") + data):
        scratch.write_bytes(content)
        with pytest.raises(fewbits.errors.FormatError):
            fewbits.load(scratch)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("", id="nothing"),
        pytest.param("{", id="open"),
        pytest.param("null", id="null"),
        pytest.param("[]", id="a list"),
        pytest.param('{"__metadata__": 1}', id="metadata a number"),
        pytest.param('{"__metadata__": {"fewbits.format_version": 1}}', id="version a number"),
        pytest.param('{"__metadata__": {"fewbits.format_version": "1"}}', id="version alone"),
        pytest.param(DEEP, id="deep"),
        pytest.param('{"a": ' * 50_000 + "1" + "}" * 50_000, id="deep objects"),
        pytest.param('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', id="negative shape"),
        pytest.param('{"a": {"dtype": "F32", "shape": [9e99], "data_offsets": [0, 4]}}', id="huge shape"),
        pytest.param('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}', id="backwards"),
        pytest.param('{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}', id="unknown dtype"),
        pytest.param("\udc80", id="not UTF-8"),
    ],
)
def test_a_header_that_is_no_header_is_refused(scratch, header):
    text = header.encode(errors="surrogateescape")
    scratch.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(fewbits.errors.CheckpointError):
        fewbits.load(scratch)


def refusal(action):
    """None if it raises a CheckpointError; otherwise its other outcome."""
    try:
        result = action()
    except fewbits.errors.CheckpointError:
        return None
    except Exception as error:
        return f"raised {type(error).__name__}"
    return None if isinstance(result, fewbits.Report) and not result.ok else "accepted"


def not_refused(path, data):
    """The readers that do not refuse a file with these bytes, with the outcome of each."""
    path.write_bytes(data)
    outcomes = {
        "load": refusal(lambda: fewbits.load(path)),
        "load, header only": refusal(lambda: fewbits.load(path, check="header")),
        "verify": refusal(lambda: verify(path)),
    }
    return {who: outcome for who, outcome in outcomes.items() if outcome}


@pytest.mark.parametrize("key", ["ledger", "architecture", "versions", "metrics", "digests", "format_version"])
def test_an_edited_string_breaks_the_digest_of_the_header(scratch, genuine, key):
    header, payload = split(genuine)
    header["__metadata__"][f"fewbits.{key}"] += " "
    assert not_refused(scratch, joined(header, payload)) == {}


def test_a_carried_over_string_is_covered_by_the_digest_of_the_header(scratch, genuine):
    header, payload = split(genuine)
    header["__metadata__"]["license"] = "none"
    scratch.write_bytes(joined(header, payload))
    with pytest.raises(fewbits.errors.DigestError, match="header"):
        fewbits.load(scratch)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda entry: entry.update(dtype="F32"), id="dtype"),
        pytest.param(lambda entry: entry.update(shape=entry["shape"][::-1]), id="shape"),
    ],
)
def test_an_edited_entry_breaks_the_digest_of_the_header(scratch, genuine, edit):
    header, payload = split(genuine)
    edit(header["layers.0.weight_packed"])
    scratch.write_bytes(joined(header, payload))
    with pytest.raises(fewbits.errors.DigestError, match="header"):
        fewbits.load(scratch)


def test_tensors_that_swap_places_are_found(scratch, genuine):
    header, payload = split(genuine)
    first, second = header["layers.0.bias"], header["norm.weight"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    scratch.write_bytes(joined(header, payload))
    with pytest.raises(fewbits.errors.DigestError):
        fewbits.load(scratch)


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", "one"])
def test_another_version_of_the_format_is_named(scratch, genuine, version):
    scratch.write_bytes(forged(genuine, lambda strings: strings.update({"fewbits.format_version": version})))
    with pytest.raises(fewbits.errors.FormatError, match=f"format version {version}"):
        fewbits.load(scratch)


# Forgeries: edited files with a header digest that fits, as a hostile or a confused program would write them.


@pytest.mark.parametrize(
    "key", ["format_version", "ledger", "architecture", "versions", "metrics", "digests", "header_digest"]
)
def test_a_missing_key_is_refused(scratch, genuine, key):
    def remove(strings):
        del strings[f"fewbits.{key}"]

    header, payload = split(forged(genuine, remove)) if key != "header_digest" else split(genuine)
    header["__metadata__"].pop(f"fewbits.{key}", None)
    assert not_refused(scratch, joined(header, payload)) == {}


WRONG_JSON = ["null", "1", '"x"', "true", "[1]", "[[]]", "[null]", '{"a": 1}', "{}", "[]", "", "{", "NaN", DEEP]
RIGHT_JSON = {"metrics": ["{}"], "versions": ["{}"], "architecture": ["null", '"x"']}


@pytest.mark.parametrize("key", ["ledger", "metrics", "digests", "versions", "architecture"])
def test_a_key_of_the_wrong_type_is_refused(scratch, genuine, key):
    problems = {}
    for value in WRONG_JSON:
        data = forged(genuine, lambda strings, value=value: strings.update({f"fewbits.{key}": value}))
        if value not in RIGHT_JSON.get(key, []) and (outcome := not_refused(scratch, data)):
            problems[value] = outcome
    assert problems == {}


WRONG = [None, -1, 1.5, "x", [], [1], ["x"], {}, {"a": 1}, 10**30, [10**30], [None], [[1]]]
NULLABLE = ("alias_of", "dequantized_from", "merged_into", "scale_dtype", "levels", "activations")
RIGHT = {"reason": ["x"]} | {field: [None] for field in NULLABLE}
QUANTIZED, KEPT, ALIAS = "layers.0.weight", "layers.0.bias", "head.weight"


def wrong_values_not_refused(scratch, genuine, field, right, find):
    """The outcome for each wrong value of a field of the object that `find` picks from the ledger."""
    problems = {}
    for value in WRONG:
        data = forged_ledger(genuine, lambda rows, value=value: find(rows).update({field: value}))
        if value not in right and (outcome := not_refused(scratch, data)):
            problems[repr(value)] = outcome
    return problems


@pytest.mark.parametrize("row", [QUANTIZED, KEPT], ids=["quantized", "kept"])
@pytest.mark.parametrize(
    "field",
    [
        "name", "shape", "dtype", "fate", "reason", "bytes_before", "bytes_after", "spec", "layout", "alias_of",
        "persistent", "dequantized_from", "merged_into", "tuned",
    ],
)  # fmt: skip
def test_a_ledger_field_of_the_wrong_type_is_refused(scratch, genuine, row, field):
    right = [None] if row == KEPT and field in ("spec", "layout") else RIGHT.get(field, [])
    assert wrong_values_not_refused(scratch, genuine, field, right, lambda rows: rows[row]) == {}


@pytest.mark.parametrize(
    "field",
    ["kind", "bits", "granularity", "group_size", "symmetric", "scale_dtype", "levels", "activations", "rounding"],
)
def test_a_spec_field_of_the_wrong_type_is_refused(scratch, genuine, field):
    right = RIGHT.get(field, [])
    assert wrong_values_not_refused(scratch, genuine, field, right, lambda rows: rows[QUANTIZED]["spec"]) == {}


@pytest.mark.parametrize("field", ["shape", "view", "permutation", "row_axes"])
def test_a_layout_field_of_the_wrong_type_is_refused(scratch, genuine, field):
    assert wrong_values_not_refused(scratch, genuine, field, [], lambda rows: rows[QUANTIZED]["layout"]) == {}


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda rows: rows.pop(QUANTIZED), id="a tensor is missing"),
        pytest.param(lambda rows: rows.update(again=rows[KEPT]), id="a name twice"),
        pytest.param(lambda rows: rows.update(again=rows[ALIAS]), id="an alias twice"),
        pytest.param(lambda rows: rows.update(again=rows[ALIAS] | {"name": KEPT}), id="an alias under a stored name"),
        pytest.param(lambda rows: rows[ALIAS].update(alias_of="nowhere"), id="alias of nothing"),
        pytest.param(lambda rows: rows[ALIAS].update(alias_of=None), id="alias of null"),
        pytest.param(lambda rows: rows[ALIAS].update(alias_of="head.weight"), id="alias of itself"),
        pytest.param(lambda rows: rows[ALIAS].update(alias_of="layers.0.bias"), id="alias of another shape"),
        pytest.param(lambda rows: rows[ALIAS].update(fate="kept"), id="an alias that should be stored"),
        pytest.param(lambda rows: rows[KEPT].update(fate="quantized"), id="quantized without a spec"),
        pytest.param(lambda rows: rows[KEPT].update(fate="cast"), id="cast without a spec"),
        pytest.param(lambda rows: rows[KEPT].update(fate="lost"), id="a fate that does not exist"),
        pytest.param(lambda rows: rows[QUANTIZED].update(fate="kept"), id="kept with a spec"),
        pytest.param(lambda rows: rows[QUANTIZED].update(shape=[200, 24]), id="another shape than the layout's"),
        pytest.param(lambda rows: rows[QUANTIZED].update(dtype="int32"), id="quantized integers"),
        pytest.param(lambda rows: rows[QUANTIZED].update(dtype="nn"), id="no dtype at all"),
        pytest.param(lambda rows: rows[QUANTIZED].update(bytes_after=1), id="other bytes"),
        pytest.param(lambda rows: rows[KEPT].update(bytes_before=-5), id="negative bytes"),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(permutation=[1, 0]), id="transposed"),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(permutation=[0, 0]), id="no permutation"),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(row_axes=2), id="no columns"),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(view=[4800]), id="another view"),
        pytest.param(
            lambda rows: rows[QUANTIZED]["layout"].update(
                view=[24, 200, *[1] * 63], permutation=[*range(65)], row_axes=1
            ),
            id="a view of more axes than torch computes with",
        ),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(shape=["24", "200"]), id="sizes as text"),
        pytest.param(lambda rows: rows[QUANTIZED]["layout"].update(view=[24.5, 200]), id="a fraction for a size"),
        pytest.param(lambda rows: rows[QUANTIZED]["spec"].update(bits=2), id="fewer bits"),
        pytest.param(lambda rows: rows[QUANTIZED]["spec"].update(symmetric=True), id="symmetric after all"),
        pytest.param(lambda rows: rows[QUANTIZED]["spec"].update(group_size=40), id="shorter groups"),
        pytest.param(lambda rows: rows[QUANTIZED]["spec"].update(novelty=1), id="an unknown field of a spec"),
        pytest.param(lambda rows: rows[QUANTIZED].update(novelty=1), id="an unknown field"),
        pytest.param(lambda rows: rows[QUANTIZED].pop("reason"), id="a missing field"),
    ],
)
def test_a_ledger_that_contradicts_itself_or_the_file_is_refused(scratch, genuine, edit):
    assert not_refused(scratch, forged_ledger(genuine, edit)) == {}


def test_the_part_that_holds_the_shape_must_agree_with_the_ledger(scratch, genuine):
    header, payload = split(genuine)
    start, _ = header["layers.0.weight_shape"]["data_offsets"]
    swapped = payload[:start] + payload[start + 8 : start + 16] + payload[start : start + 8] + payload[start + 16 :]
    scratch.write_bytes(joined(header, swapped))
    with pytest.raises(fewbits.errors.FormatError, match="shape"):
        fewbits.load(scratch, check="header")


def test_verifying_finds_that_too_though_the_digests_fit(scratch, genuine):
    scratch.write_bytes(forged_tensor(genuine, "layers.0.weight_shape", bytes(16)))
    for read in (verify, fewbits.load):
        with pytest.raises(fewbits.errors.FormatError, match=r"'shape' is \(0, 0\), but the layout has \(24, 200\)"):
            read(scratch)


@pytest.mark.parametrize("scale", [0.0, -0.0, math.nan, math.inf, -math.inf])
def test_a_scale_that_no_code_can_have_is_refused_though_the_digests_fit(scratch, genuine, scale):
    header, payload = split(genuine)
    start, stop = header["layers.0.weight_scale"]["data_offsets"]
    content = payload[start : stop - 4] + struct.pack("<f", scale)
    scratch.write_bytes(forged_tensor(genuine, "layers.0.weight_scale", content))
    with pytest.raises(fewbits.errors.FormatError, match=r"zero, NaN or Inf, of layers\.0\.weight;"):
        fewbits.load(scratch)
    assert not verify(scratch).ok
    assert len(fewbits.load(scratch, check="header")) == len(state())


@pytest.mark.parametrize("key", ["ledger", "metrics", "digests", "versions"])
def test_a_name_that_is_twice_in_the_metadata_is_refused(scratch, genuine, key):
    """Of two values one reader would believe the one, another reader the other."""

    def edit(strings):
        text = strings[f"fewbits.{key}"]
        name = text.removeprefix("[").removeprefix("{").partition(":")[0]
        strings[f"fewbits.{key}"] = text.replace(f"{name}:", f"{name}:null,{name}:", 1)

    scratch.write_bytes(forged(genuine, edit))
    with pytest.raises(fewbits.errors.FormatError, match=f"is in its {key} twice"):
        fewbits.load(scratch)


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "1e999", '"x"', "[]"])
def test_a_metric_that_is_no_finite_number_is_refused(scratch, genuine, figure):
    def edit(strings):
        figures = {"max_abs_error": 0, "cosine": 0, "worst_bound_ratio": 0}
        text = json.dumps({QUANTIZED: {"sqnr_db": "HERE", **figures}}).replace('"HERE"', figure)
        strings["fewbits.metrics"] = text

    scratch.write_bytes(forged(genuine, edit))
    with pytest.raises(fewbits.errors.FormatError, match="sqnr_db must be a finite number"):
        fewbits.load(scratch)


@pytest.mark.parametrize("value", [None, 1, "", "0" * 64, ["x"]], ids=repr)
def test_a_digest_that_is_not_the_tensors_is_found(scratch, genuine, value):
    def edit(strings):
        digests = json.loads(strings["fewbits.digests"])
        digests["layers.0.bias"] = value
        strings["fewbits.digests"] = json.dumps(digests)

    scratch.write_bytes(forged(genuine, edit))
    with pytest.raises(fewbits.errors.CheckpointError, match=r"layers\.0\.bias|metadata"):
        fewbits.load(scratch)


@pytest.mark.parametrize("change", ["missing", "superfluous"])
def test_every_tensor_has_a_digest_and_every_digest_a_tensor(scratch, genuine, change):
    def edit(strings):
        digests = json.loads(strings["fewbits.digests"])
        if change == "missing":
            del digests["layers.0.bias"]
        else:
            digests["other"] = "0" * 64
        strings["fewbits.digests"] = json.dumps(digests)

    scratch.write_bytes(forged(genuine, edit))
    with pytest.raises(fewbits.errors.FormatError, match=r"layers\.0\.bias" if change == "missing" else "other"):
        fewbits.load(scratch, check="header")


def test_a_tensor_that_the_ledger_does_not_know_is_refused(scratch, genuine):
    header, payload = split(genuine)
    header["stowaway"] = {"dtype": "I32", "shape": [1], "data_offsets": [len(payload), len(payload) + 4]}
    sign(header)
    scratch.write_bytes(joined(header, payload + bytes(4)))
    with pytest.raises(fewbits.errors.FormatError, match="stowaway"):
        fewbits.load(scratch)


def test_a_damaged_file_leaves_the_model_as_it_was(scratch):
    model = nn.Sequential(nn.Linear(70, 4), nn.LayerNorm(4))
    save(scratch, model)
    data = bytearray(scratch.read_bytes())
    data[-1] ^= 1
    scratch.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(fewbits.errors.DigestError):
        fewbits.load(scratch, into=model)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_source_is_a_named_error(scratch, genuine):
    scratch.write_bytes(genuine[:-1])
    with pytest.raises(fewbits.errors.CheckpointError):
        open_source(scratch)


class WithoutLevel(AnyScheme):
    """Gives every hundredth weight a code that has no level."""

    def quantize_tensor(self, weight, spec, observer):
        value = super().quantize_tensor(weight, spec, observer)
        codes = unpack(value.packed, spec.bits, weight.layout.columns)
        codes.view(-1)[::100] = 2**spec.bits - 1
        return attrs.evolve(value, packed=pack(codes, spec.bits))


@pytest.mark.parametrize("levels", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_a_code_without_a_level_is_refused_by_load_and_found_by_verify(tmp_path, levels):
    tensors = {"a.weight": torch.ones(2, 40), "b.weight": torch.randn(30, 70)}
    scheme = WithoutLevel(fewbits.QuantSpec((len(levels) - 1).bit_length(), "channel", levels=levels))
    scheme.prepare(tensors)
    scheme.convert()
    scheme.save(tmp_path / "f")
    with pytest.raises(FormatError, match=r"a code has no level, of a\.weight, b\.weight; quantize again"):
        fewbits.load(tmp_path / "f")
    assert int(fewbits.load(tmp_path / "f", check="header")["b.weight"].dequantize().isnan().sum()) == 21
    report = fewbits.verify(tmp_path / "f")
    assert report.failures == ["a.weight: a code has no level", "b.weight: a code has no level"]
