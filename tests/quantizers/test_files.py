"""From file to file: any chunks, threads and source files give the bytes of a result in memory."""

import gc
import json
import math
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import attrs
import pytest
import safetensors.torch
import torch
from file_cases import INDEX, SCHEMES, checkpoint
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.conversion.streaming import in_order
from fewbits.errors import CheckpointError, FormatError
from fewbits.extend import QuantParams
from fewbits.numerics.metrics import Tally
from support.checkpoints import write_shards
from support.lifecycle_helpers import FEWER_EXAMPLES, JsonSerializer, files_in, quantize_small, small, visible


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    safetensors.torch.save_file(checkpoint(), folder / "one.safetensors")
    return {"one": folder / "one.safetensors", "many": write_shards(folder / "many", checkpoint(), 3)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The saved result of a state dict in memory, in one file and in many, by scheme and block size."""
    made = {}

    def make(scheme, block):
        if (scheme, block) not in made:
            folder = tmp_path_factory.mktemp("expected")
            result = fewbits.quantize(checkpoint(), SCHEMES[scheme](), on_failure="ignore")
            result.save(folder / "one.safetensors")
            result.save(folder / "many", max_shard_size=12_000)
            made[scheme, block] = (folder / "one.safetensors").read_bytes(), files_in(folder / "many")
        return made[scheme, block]

    return make


@FEWER_EXAMPLES
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    source=st.sampled_from(["one", "many"]),
    threads=st.integers(1, 3),
    chunk=st.integers(1, 40),
    block=st.sampled_from([1 << 18, 100]),
)
def test_files_have_the_bytes_of_a_result_in_memory(
    tmp_path_factory, sources, expected, scheme, source, threads, chunk, block
):
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        patch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", chunk * block)
        one, many = expected(scheme, block)
        output = fewbits.Output(folder / "many", max_shard_size=12_000, threads=threads)
        report = fewbits.quantize(sources[source], SCHEMES[scheme](), output=output, on_failure="ignore").report
        again = fewbits.verify(folder / "many", sources[source])
        if source == "one":
            output = fewbits.Output(folder / "one.safetensors", threads=threads)
            fewbits.quantize(sources[source], SCHEMES[scheme](), output=output, on_failure="ignore")
            assert (folder / "one.safetensors").read_bytes() == one
    assert report.to_dict() == again.to_dict()
    assert files_in(folder / "many").keys() == many.keys()
    assert fewbits.load(folder / "many").keys() == checkpoint().keys()
    for name, data in files_in(folder / "many").items():
        assert data == many[name], name


@pytest.fixture
def folder(tmp_path):
    """A directory like those on model hubs: shards, configuration, and unrelated files."""
    folder = write_shards(tmp_path / "model", checkpoint(), 3)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "pytorch_model.bin.index.json",
                 ".gitattributes", ".cache/refs"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("weights in another form")
    return folder


def test_companion_files_are_copied_and_other_files_are_named(folder, tmp_path, caplog):
    (tmp_path / "secret").write_text("secret")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "alias.md").symlink_to("README.md")
    with caplog.at_level("WARNING", "fewbits"):
        quantize_small(folder, "int8", output=tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    carried = {"config.json", "tokenizer.json", "1_Pooling/config.json", "README.md", "alias.md"}
    assert found.keys() == carried | {"model.safetensors"}
    assert all(found[name].read_text() == (folder / name).read_text() for name in carried)
    assert not any(path.is_symlink() for path in found.values())
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", ".gitattributes", ".cache/",
                 "link.json", "elsewhere/", "pytorch_model.bin.index.json"):  # fmt: skip
        assert name in caplog.text


def test_a_directory_and_its_index_are_the_same_checkpoint(folder, tmp_path):
    quantize_small(folder, "int8", output=tmp_path / "by folder")
    quantize_small(folder / INDEX, "int8", output=tmp_path / "by index")
    assert files_in(tmp_path / "by folder") == files_in(tmp_path / "by index")


def test_a_tensor_that_the_index_does_not_list_is_carried_through(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    ledger = quantize_small(folder, "int8", output=tmp_path / "out").ledger
    assert len(ledger) == len(checkpoint())
    assert torch.equal(fewbits.load(tmp_path / "out")["norm.weight"], checkpoint()["norm.weight"])


def more(folder, **tensors):
    path = folder / "model-00002-of-00003.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | tensors, path)


def expect_lost(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def of_ours(folder):
    result = quantize_small({"b.weight": torch.rand(32, 32)}, "int8")
    result.save(folder / "model-00002-of-00003.safetensors")


BAD = {
    "one name in two files": (lambda f: more(f, **{"a.weight": torch.ones(2)}), fewbits.errors.FormatError,
                              r"a\.weight in more than one"),
    "a name in no file": (expect_lost, fewbits.errors.FormatError, r"names lost\.weight, which none"),
    "a quantized shard": (of_ours, fewbits.errors.SourceError, "00002-of-00003.safetensors was written by fewbits"),
    "scales of another tool": (lambda f: more(f, **{"a.weight_scale_inv": torch.ones(2)}), fewbits.errors.SourceError,
                               r"a\.weight .* quantized already"),
    "a shard that is missing": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), CheckpointError,
                                "missing: model-00002"),
    "a shard that holds text": (lambda f: (f / "model-00002-of-00003.safetensors").write_text("x"), FormatError,
                             "00002-of-00003.safetensors is text, which holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_a_checkpoint_that_contradicts_itself_is_refused_before_anything_is_written(folder, tmp_path, how):
    damage, error, message = BAD[how]
    damage(folder)
    with pytest.raises(error, match=message):
        quantize_small(folder, "int8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_number_in_any_chunk_is_named_by_its_index(tmp_path, monkeypatch, scheme, dtype, value):
    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 300)
    weight = torch.rand(6, 50, 20).to(dtype)
    weight[4, 31, 7] = value
    safetensors.torch.save_file({"m.weight": weight}, tmp_path / "in")
    for source in (tmp_path / "in", {"m.weight": weight}):
        output = {"output": tmp_path / "out"} if source == tmp_path / "in" else {}
        with pytest.raises(fewbits.errors.NonFiniteError, match=r"m\.weight.*index \(4, 31, 7\)"):
            quantize_small(source, scheme, **output)
    assert not (tmp_path / "out").exists()


def test_a_number_beyond_the_range_of_a_cast_is_named_by_its_index(tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 100)
    weight = torch.rand(70, 20)
    weight[61, 3] = 1e6
    safetensors.torch.save_file({"m.weight": weight}, tmp_path / "in")
    with pytest.raises(fewbits.errors.RangeError, match=r"m\.weight.*index \(61, 3\) is 1e\+06"):
        quantize_small(tmp_path / "in", "fp16", output=tmp_path / "out")


def test_a_scale_beyond_the_range_of_its_dtype_is_refused_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 100)
    weight = torch.rand(70, 20)
    weight[61, 3] = 1e38
    safetensors.torch.save_file({"m.weight": weight}, tmp_path / "in")
    with pytest.raises(fewbits.errors.RangeError, match=r"m\.weight, shape \(70, 20\).*scale"):
        quantize_small(tmp_path / "in", "int8", scale_dtype="float16", output=tmp_path / "out")


def test_a_source_that_changes_during_the_run_leaves_nothing_behind(folder, tmp_path):
    def change(step):
        if step.done:
            path = folder / "model-00003-of-00003.safetensors"
            path.write_bytes(path.read_bytes())

    with pytest.raises(fewbits.errors.CheckpointError, match="has changed since it was opened"):
        quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", threads=1), progress=change)
    assert visible(tmp_path) == ["model"]
    with pytest.raises(
        fewbits.errors.ArgumentError, match=r"source: model-00003-of-00003\.safetensors \(time of change\) changed"
    ):
        quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", resume=True))
    quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", replace=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_progress_counts_every_byte_once(folder, tmp_path, threads):
    steps = []
    output = fewbits.Output(tmp_path / "out", threads=threads)
    ledger = quantize_small(folder, "int4", output=output, progress=steps.append).ledger
    steps = [step for step in steps if step.activity == "convert"]
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == ledger.bytes_before
    assert {step.name for step in steps} == {row.name for row in ledger}


@pytest.mark.slow
def test_no_tallies_are_held_for_finished_tensors(tmp_path):
    """Tallies would grow with the file; a measurement is a few numbers per tensor."""
    safetensors.torch.save_file({f"{index}.weight": torch.randn(8, 64) for index in range(40)}, tmp_path / "in")
    held = []
    output = fewbits.Output(tmp_path / "out", threads=1)
    quantize_small(
        tmp_path / "in",
        "int8",
        output=output,
        progress=lambda _: held.append(sum(type(thing) is Tally for thing in gc.get_objects())),
    )
    assert max(held) - held[0] <= 3


@pytest.mark.parametrize("name", ["out.pt", "out.BIN", "out.gguf"])
def test_an_output_with_the_suffix_of_another_format_is_refused(sources, tmp_path, name):
    with pytest.raises(
        fewbits.errors.ArgumentError, match=r"the result is a \.safetensors file: call it out\.safetensors"
    ):
        quantize_small(sources["one"], "int8", output=tmp_path / name)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"call it out\.safetensors"):
        fewbits.plan(sources["one"], "int8", output=tmp_path / name)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"call it out\.safetensors"):
        quantize_small({"weight": torch.randn(4, 256)}, "int8").save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_other_suffixes_are_allowed_and_another_serializer_may_use_any(sources, tmp_path):
    for name in ("out", "out.v1", "OUT.SAFETENSORS"):
        quantize_small(sources["one"], "int8", output=tmp_path / name)
    quantizer = SCHEMES["int8"](serializer=JsonSerializer())
    fewbits.quantize({"weight": torch.randn(4, 256)}, quantizer).save(tmp_path / "out.npz")


def test_a_directory_that_exists_is_replaced_only_if_asked(folder, tmp_path):
    quantize_small(folder, "int8", output=tmp_path / "out")
    before = files_in(tmp_path / "out")
    with pytest.raises(fewbits.errors.ArgumentError, match="a directory with files in it"):
        quantize_small(folder, "int4", output=tmp_path / "out")
    assert files_in(tmp_path / "out") == before
    quantize_small(folder, "int4", output=fewbits.Output(tmp_path / "out", replace=True))
    assert files_in(tmp_path / "out").keys() == before.keys()
    assert files_in(tmp_path / "out") != before


def test_a_directory_with_the_name_of_a_file_is_refused(folder, sources, tmp_path):
    for call in (fewbits.plan, quantize_small):
        with pytest.raises(
            fewbits.errors.ArgumentError, match=r"out\.safetensors is the name of .*directory, such as .*/out$"
        ):
            call(folder, "int8", output=tmp_path / "out.safetensors")
    with pytest.raises(fewbits.errors.ArgumentError, match="is the name of"):
        quantize_small({"a": torch.randn(32, 32)}, "int8").save(tmp_path / "out.bin", max_shard_size="1GB")
    (tmp_path / "one").mkdir()
    shutil.copy(sources["one"], tmp_path / "one" / "model.safetensors")
    with pytest.raises(
        fewbits.errors.ArgumentError, match=r"for a file alone, give .*one/model\.safetensors as the source"
    ):
        quantize_small(tmp_path / "one", "int8", output=tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "one"}


@pytest.mark.parametrize("missing", ["does not exist", "is a file"])
def test_a_missing_parent_directory_is_named_before_any_work(folder, tmp_path, missing):
    if missing == "is a file":
        (tmp_path / "no").touch()
    before = files_in(tmp_path)

    def never(step):
        raise AssertionError("work is done")

    said = rf"cannot be written: the directory {tmp_path / 'no'} {missing}"
    result = quantize_small({"a": torch.randn(32, 32)}, "int8")
    with pytest.raises(fewbits.errors.CheckpointError, match=said):
        quantize_small(folder, "int8", output=tmp_path / "no" / "out", progress=never)
    with pytest.raises(fewbits.errors.CheckpointError, match=said):
        fewbits.plan(folder, "int8", output=tmp_path / "no" / "out")
    for shard_size in (None, "1GB"):
        with pytest.raises(fewbits.errors.CheckpointError, match=said):
            result.save(tmp_path / "no" / "out", max_shard_size=shard_size)
    assert files_in(tmp_path) == before


LINKS = {
    "to a directory": lambda target: (target.mkdir(), (target / "old").touch()),
    "to an empty directory": lambda target: target.mkdir(),
    "to nothing": lambda target: None,
}


@pytest.mark.parametrize("link", LINKS)
def test_a_linked_directory_is_replaced_only_if_asked_and_the_link_stays(folder, tmp_path, link):
    LINKS[link](tmp_path / "target")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    before = files_in(tmp_path)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"out is a link to .*target"):
        quantize_small(folder, "int8", output=tmp_path / "out")
    with pytest.raises(fewbits.errors.ArgumentError, match=r"out is a link to .*target"):
        quantize_small({"a": torch.randn(32, 32)}, "int8").save(tmp_path / "out", max_shard_size="1GB")
    assert files_in(tmp_path) == before
    quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", replace=True))
    assert (tmp_path / "out").is_symlink()
    assert fewbits.verify(tmp_path / "target", folder).ok
    assert "old" not in files_in(tmp_path / "target")


@pytest.mark.parametrize("refusal", ["raised", "ignored"])
def test_a_replaced_directory_that_cannot_be_removed_is_named(folder, tmp_path, monkeypatch, caplog, refusal):
    """It belongs to another user: its parent allows renaming it, but its files cannot be removed."""
    remove = shutil.rmtree

    def refused(path, **how):
        if not (Path(path) / "theirs").exists():
            remove(path, **how)
        elif refusal == "raised":
            raise PermissionError(13, "Permission denied")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("precious")
    monkeypatch.setattr(shutil, "rmtree", refused)
    quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", replace=True))
    assert fewbits.verify(tmp_path / "out", folder).ok
    (left,) = tmp_path.glob(".fewbits-*")
    assert files_in(left) == {"theirs": b"precious"}
    assert str(left) in caplog.text
    assert "remove this directory yourself" in caplog.text


@pytest.mark.parametrize("given", ["folder", "index", "file"])
@pytest.mark.parametrize("shard_size", [None, "1GB"])
def test_the_source_is_never_replaced_nor_written_into(folder, tmp_path, given, shard_size):
    (tmp_path / "by another name").symlink_to(folder)
    file = folder / "model-00001-of-00003.safetensors"
    source = {"folder": folder, "index": folder / INDEX, "file": file}[given]
    before = files_in(tmp_path)
    places = [folder, tmp_path, tmp_path / "by another name", file]
    for place in [*places, folder / "out", folder / INDEX] if given != "file" else places:
        for read in (fewbits.plan, fewbits.quantize):
            with pytest.raises(fewbits.errors.ArgumentError):
                read(source, "int8", output=fewbits.Output(place, replace=True, max_shard_size=shard_size))
    assert files_in(tmp_path) == before


def test_a_directory_that_appears_at_the_output_during_the_run_is_not_removed(folder, tmp_path):
    def intrude(step):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("precious")

    with pytest.raises(fewbits.errors.CheckpointError, match="out cannot be written"):
        quantize_small(folder, "int8", output=tmp_path / "out", progress=intrude)
    assert files_in(tmp_path / "out") == {"theirs": b"precious"}
    (tmp_path / "out" / "theirs").rename(tmp_path / "theirs")
    quantize_small(folder, "int8", output=fewbits.Output(tmp_path / "out", resume=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "theirs"}


def test_an_interrupt_during_the_replacement_restores_the_old_directory(folder, tmp_path, monkeypatch):
    quantize_small(folder, "int8", output=tmp_path / "out")
    before, rename = files_in(tmp_path / "out"), type(tmp_path).rename

    def interrupted(self, target):
        if target == tmp_path / "out" and files_in(self) != before:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_small(folder, "int4", output=fewbits.Output(tmp_path / "out", replace=True))
    assert files_in(tmp_path / "out") == before
    monkeypatch.undo()
    quantize_small(folder, "int4", output=fewbits.Output(tmp_path / "out", replace=True, resume=True))
    assert files_in(tmp_path / "out") != before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_an_error_names_the_output_and_not_the_staged_file(folder, tmp_path, monkeypatch):
    def full(self, data, position):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbits.checkpoint.safetensors._SafetensorsWriter._put", full)
    with pytest.raises(fewbits.errors.CheckpointError, match=r"/out/model\.safetensors.*No space left") as refused:
        quantize_small(folder, "int8", output=tmp_path / "out")
    assert ".tmp" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("damage", ["a flipped bit", "another result"])
def test_a_damaged_result_is_not_saved_again(folder, tmp_path, damage):
    quantizer = small()
    quantizer.prepare(folder)
    quantizer.convert(output=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    if damage == "another result":
        quantize_small({"other.weight": torch.rand(32, 32)}, "int8").save(file)
    else:
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    with pytest.raises(fewbits.errors.CheckpointError, match=r"not the result of convert|not the bytes"):
        quantizer.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Halves(fewbits.MinMaxObserver):
    """Overrides `observe_weight`, and inherits `observe_chunks`."""

    def observe_weight(self, weight, spec):
        params = super().observe_weight(weight, spec)
        return attrs.evolve(params, scale=params.scale / 2)


def test_an_observer_that_overrides_observe_weight_is_used_for_chunks_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 100)
    tensors = {"m.weight": torch.rand(90, 30)}
    safetensors.torch.save_file(tensors, tmp_path / "in")
    expected = fewbits.quantize(tensors, small(fewbits.Int8PerTensor, observer=Halves()), fail_under=0)
    expected.save(tmp_path / "expected")
    scheme = small(fewbits.Int8PerTensor, observer=Halves())
    fewbits.quantize(tmp_path / "in", scheme, fail_under=0, output=tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize(
    "chosen",
    [None, (torch.ones(1), None), QuantParams(1.0), QuantParams(torch.ones(2)), QuantParams(torch.tensor([math.nan]))],
)
def test_scales_that_an_observer_chooses_for_chunks_are_checked(tmp_path, monkeypatch, chosen):
    class Odd(fewbits.MinMaxObserver):
        def observe_weight(self, weight, spec):
            return chosen

    monkeypatch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", 100)
    safetensors.torch.save_file({"m.weight": torch.rand(90, 30)}, tmp_path / "in")
    with pytest.raises(fewbits.errors.NumericsError, match=r"m\.weight, shape \(90, 30\)"):
        fewbits.quantize(tmp_path / "in", small(fewbits.Int8PerTensor, observer=Odd()), output=tmp_path / "out")


def test_an_index_that_contradicts_its_files_is_refused(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(index["weight_map"])[:2]
    index["weight_map"][first] = index["weight_map"][second]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(fewbits.errors.FormatError, match=r"says that .* is in model-0000.*; it is in another file"):
        quantize_small(folder, "int8", output=tmp_path / "out")


def test_several_files_without_an_index_are_refused(folder):
    for name in (INDEX, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors",
                 "consolidated.safetensors", "pytorch_model.bin.index.json"):  # fmt: skip
        (folder / name).unlink()
    for read in (lambda: fewbits.plan(folder, "int8"), lambda: fewbits.load(folder)):
        with pytest.raises(fewbits.errors.FormatError, match=r"model-00002-of-00003\.safetensors and no index"):
            read()


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": "2"}, {"threads": True}, {"max_shard_size": "many"}])
def test_an_invalid_output_is_refused(tmp_path, options):
    with pytest.raises(fewbits.errors.ArgumentError, match=next(iter(options))):
        fewbits.Output(tmp_path, **options)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 4))
def test_results_come_in_order_and_few_of_them_wait(delays, threads):
    running, most = [], []

    def task(index):
        time.sleep(delays[index] / 10_000)
        return index

    def tasks():
        for index in range(len(delays)):
            running.append(index)
            most.append(len(running))
            yield partial(task, index)

    found = []
    for index in in_order(tasks(), threads):
        running.remove(index)
        found.append(index)
    assert found == list(range(len(delays)))
    assert max(most, default=0) <= threads + 1


def test_an_error_on_a_thread_reaches_the_caller_and_torch_threads_are_restored():
    before, seen = torch.get_num_threads(), set()

    def task(index):
        seen.add((threading.get_ident() == caller, torch.get_num_threads()))
        if index == 3:
            raise InterruptedError("the third")
        return index

    caller, torch_before = threading.get_ident(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(InterruptedError, match="the third"):
            list(in_order((partial(task, index) for index in range(100)), 2))
        assert seen == {(False, 1)}
        assert torch.get_num_threads() == 2
        assert list(in_order((torch.get_num_threads for _ in range(3)), 1)) == [1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(torch_before)
    assert torch.get_num_threads() == before


def test_a_plan_for_a_directory_an_index_and_a_file_needs_no_output(folder):
    assert len(fewbits.plan(folder, "int8").shards) == len(fewbits.plan(folder / INDEX, "int8").shards) == 1
    assert len(fewbits.plan(folder / "model-00001-of-00003.safetensors", "int8").shards) == 1
