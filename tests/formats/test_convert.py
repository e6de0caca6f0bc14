"""`fewbits.convert` and the command: refusals, unfinished results, and the metadata that the fewbits format keeps."""

import json
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
from fewbits.checkpoint.reading import Checkpoint
from fewbits.cli.commands import run as run_cli
from fewbits.errors import ArgumentError, CheckpointError, DigestError, FormatError
from fewbits.formats.base import Exporter
from fewbits.formats.fewbits_format import FewbitsFormat
from fewbits.numerics.tensor import same_bits


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (48, 64), "a.bias": (48,), "b.weight": (8, 64), "embed.weight": (96, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path) -> Path:
    """The directory of a quantized model, with a tokenizer and a nested configuration."""
    source = tmp_path / "float"
    (source / "1_Pooling").mkdir(parents=True)
    safetensors.torch.save_file(weights(), source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "any", "vocab_size": 96}')
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    fewbits.quantize(source, "int8", output=tmp_path / "small", exclude=["embed"])
    return tmp_path / "small"


@pytest.fixture
def file(tmp_path) -> Path:
    """A quantized file."""
    safetensors.torch.save_file(weights(), tmp_path / "float.safetensors")
    fewbits.quantize(tmp_path / "float.safetensors", "int8", output=tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        code = run_cli()
        return code, *capsys.readouterr()

    return run


class OneFile(Exporter):
    """Writes the dequantized tensors to one file."""

    name = "one-file"
    suffix = ".npz"
    damage = False

    def obstacles(self, source):
        return {
            name: "is odd" for name in ("a.weight", "b.weight", "a.bias", "embed.weight") if "odd" in str(source.path)
        }

    def write(self, source, target, progress):
        tensors = {row.name: source.value(row.name) for row in source.ledger.stored}
        tensors = {name: t.dequantize() if hasattr(t, "dequantize") else t for name, t in tensors.items()}
        if self.damage:
            tensors["b.weight"] = tensors["b.weight"] + 1e-3
        safetensors.torch.save_file(tensors, target)

    def open(self, target):
        class Opened:
            path = target
            ledger = safetensors.torch.load_file(target)
            value = ledger.__getitem__

        return Opened()


class Damaged(OneFile):
    damage = True


class Incomplete(OneFile):
    def open(self, target):
        opened = super().open(target)
        del opened.ledger["b.weight"]
        return opened


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# What is written.


def test_a_directory_is_converted_with_its_companions_and_equal_values(directory, tmp_path):
    exported = fewbits.convert(directory, tmp_path / "out")
    assert (exported.path, exported.format, exported.remarks) == (tmp_path / "out", "fewbits", {})
    assert (exported.quantized, exported.kept) == (2, 2)
    assert exported.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert names(tmp_path / "out") == names(directory)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_text() == (directory / name).read_text()
    assert fewbits.verify(tmp_path / "out", tmp_path / "float").ok


def test_the_fewbits_format_keeps_the_metadata_of_a_fewbits_checkpoint(directory, tmp_path):
    fewbits.convert(directory, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").metadata == Checkpoint(directory).metadata
    assert Checkpoint(directory).metadata.metrics


@settings(max_examples=8)
@given(size=st.integers(1, 30_000))
def test_shards_of_any_size_hold_the_same_checkpoint(tmp_path_factory, size):
    scratch = tmp_path_factory.getbasetemp()
    source = scratch / "any-shards.safetensors"
    if not source.exists():
        fewbits.quantize(weights(), "int8").save(source)
    fewbits.convert(source, scratch / "any-shards", FewbitsFormat(max_shard_size=size), replace=True)
    expected, found = fewbits.load(source), fewbits.load(scratch / "any-shards")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert same_bits(value, found[name])
    shards = [*(scratch / "any-shards").glob("*.safetensors")]
    assert (len(shards) > 1) == (scratch / "any-shards" / "model.safetensors.index.json").is_file()


def test_the_index_and_the_directory_of_a_source_are_the_same_checkpoint(directory, tmp_path):
    fewbits.convert(directory, tmp_path / "shards", FewbitsFormat(max_shard_size=2000))
    fewbits.convert(tmp_path / "shards" / "model.safetensors.index.json", tmp_path / "out")
    assert names(tmp_path / "out") == names(directory)
    assert Checkpoint(tmp_path / "out").headers == Checkpoint(directory).headers


def test_a_result_that_transformers_cannot_read_gets_names_that_it_does_not_look_for(tmp_path, directory):
    fewbits.quantize(tmp_path / "float", "int4", group_size=32, symmetric=False, output=tmp_path / "asymmetric")
    fewbits.convert(tmp_path / "asymmetric", tmp_path / "out", FewbitsFormat(max_shard_size=2000))
    assert [name for name in names(tmp_path / "out") if name.startswith("model")] == []
    assert "fewbits.safetensors.index.map.json" in names(tmp_path / "out")
    config, expected = (tmp_path / folder / "config.json" for folder in ("out", "asymmetric"))
    found, whole = (json.loads(path.read_text())["quantization_config"] for path in (config, expected))
    assert found["quant_method"] == "fewbits"
    assert found | {"first_file": whole["first_file"]} == whole
    assert found["first_file"] in names(tmp_path / "out")
    assert fewbits.verify(tmp_path / "out", tmp_path / "float").ok


def test_quantization_files_of_the_source_stay_behind(directory, tmp_path, events):
    (directory / "hf_quant_config.json").write_text("{}")
    (directory / "other.bin").write_bytes(b"")
    fewbits.convert(directory, tmp_path / "out")
    assert not {"hf_quant_config.json", "other.bin"} & {*names(tmp_path / "out")}
    assert [event["files"] for event in events if event["event"] == "left_behind"] == [["other.bin"]]


def test_progress_covers_writing_and_reading_back(directory, tmp_path):
    steps = []
    fewbits.convert(directory, tmp_path / "out", progress=steps.append)
    for activity in ("convert", "validate"):
        done = [step.done for step in steps if step.activity == activity]
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] == steps[0].total > 0


# Paths.


def test_a_path_that_would_damage_the_source_is_refused(directory, file, tmp_path):
    (directory / "inside").mkdir()
    before = names(directory)
    for source, output in [
        (directory, directory),
        (directory, directory / "inside"),
        (directory, directory / "inside" / "new"),
        (directory, tmp_path),
        (directory / "model.safetensors", directory),
        (file, tmp_path),
    ]:
        with pytest.raises(ArgumentError, match="is the source, holds it or lies inside of it"):
            fewbits.convert(source, output, replace=True)
    assert names(directory) == before


def test_a_link_does_not_hide_that_the_output_is_the_source(directory, tmp_path):
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(ArgumentError, match="is the source"):
        fewbits.convert(directory, tmp_path / "link", replace=True)


def test_existing_results_are_replaced_on_request_only(directory, file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"out is a directory with files in it.*--replace"):
        fewbits.convert(directory, out)
    assert names(out) == ["mine.txt"]
    fewbits.convert(directory, out, replace=True)
    assert "mine.txt" not in names(out)
    single = tmp_path / "out.npz"
    single.write_text("mine")
    with pytest.raises(ArgumentError, match=r"out\.npz exists.*--replace"):
        fewbits.convert(file, single, OneFile())
    assert single.read_text() == "mine"
    fewbits.convert(file, single, OneFile(), replace=True)
    assert safetensors.torch.load_file(single).keys() == weights().keys()


def test_an_empty_directory_takes_a_result(directory, tmp_path):
    (tmp_path / "out").mkdir()
    fewbits.convert(directory, tmp_path / "out")
    assert names(tmp_path / "out") == names(directory)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("out.safetensors", ArgumentError, "is the name of a .safetensors file, but the result is a directory"),
        ("missing/out", CheckpointError, r"the directory .*missing does not exist"),
        ("float.safetensors/out", CheckpointError, r"float\.safetensors is a file"),
        ("float.safetensors", ArgumentError, "is the name of a .safetensors file|is a file"),
        ("a\0b", CheckpointError, "cannot be written"),
    ],
)  # fmt: skip
def test_a_path_where_no_directory_can_be_is_refused(file, tmp_path, output, error, message):
    before = names(tmp_path)
    with pytest.raises(error, match=message):
        fewbits.convert(file, tmp_path / output)
    assert names(tmp_path) == before


def test_a_file_of_another_name_is_refused(file, tmp_path):
    with pytest.raises(ArgumentError, match=r"out must end in \.npz, because the result is a file of one-file"):
        fewbits.convert(file, tmp_path / "out", OneFile())


# Sources.


def test_a_source_that_is_not_quantized_is_refused(tmp_path, file):
    with pytest.raises(FormatError, match="was not written by fewbits; quantize it first"):
        fewbits.convert(tmp_path / "float.safetensors", tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        fewbits.convert(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_not_published(directory, tmp_path):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = names(tmp_path)
    with pytest.raises(DigestError, match="damaged"):
        fewbits.convert(directory, tmp_path / "out")
    assert names(tmp_path) == before


# Failures on the way.


def test_a_result_that_reads_back_with_other_values_is_not_published(file, tmp_path):
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=r"b\.weight reads back with other values than .*small\.safetensors has"):
        fewbits.convert(file, tmp_path / "out.npz", Damaged())
    with pytest.raises(CheckpointError, match=r"out\.npz: b\.weight was not written"):
        fewbits.convert(file, tmp_path / "out.npz", Incomplete())
    assert names(tmp_path) == before


@pytest.mark.parametrize("activity", ["convert", "validate"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interruption_leaves_nothing_and_keeps_what_was_there(directory, tmp_path, activity, existing):
    def stop(step):
        if step.activity == activity and step.done:
            raise KeyboardInterrupt

    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fewbits.convert(directory, tmp_path / "out", replace=True, progress=stop)
    assert names(tmp_path) == before
    assert not existing or names(tmp_path / "out") == ["mine.txt"]


def test_an_error_names_the_output_and_not_a_temporary_file(directory, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbits.checkpoint.safetensors.os.truncate", full)
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        fewbits.convert(directory, tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert names(tmp_path) == before


# Formats and obstacles.


def test_an_unknown_format_is_refused_with_all_names(file, tmp_path):
    with pytest.raises(ArgumentError, match=r"format must be 'fewbits', .*'compressed-tensors'.* not 'gptq'"):
        fewbits.convert(file, tmp_path / "out", "gptq")


def test_settings_of_a_named_format_are_arguments(directory, tmp_path):
    fewbits.convert(directory, tmp_path / "out", "fewbits", max_shard_size="2kB", allow=True)
    assert "model.safetensors.index.json" in names(tmp_path / "out")
    with pytest.raises(ArgumentError, match="'fewbits' does not take 'template'; it takes allow, max_shard_size"):
        fewbits.convert(directory, tmp_path / "other", "fewbits", template="x")
    with pytest.raises(ArgumentError, match="allow: an Exporter has settings of its own"):
        fewbits.convert(directory, tmp_path / "other", FewbitsFormat(), allow=True)


@pytest.mark.parametrize("size", [0, "much", 1.5])
def test_a_shard_size_that_is_no_size_is_refused(size):
    with pytest.raises(ArgumentError, match="max_shard_size must be a number of bytes"):
        FewbitsFormat(max_shard_size=size)


def test_obstacles_are_named_and_refused_before_anything_is_written(tmp_path, file):
    odd = file.rename(tmp_path / "odd.safetensors")
    before = names(tmp_path)
    with pytest.raises(ArgumentError) as caught:
        fewbits.convert(odd, tmp_path / "out.npz", OneFile())
    assert str(caught.value) == (
        "readers of one-file cannot take this checkpoint: a.weight is odd; b.weight is odd; a.bias is odd; and 1 more. "
        "Quantize with other settings, or write it anyway (--allow, allow=True)"
    )
    assert names(tmp_path) == before


def test_allowed_obstacles_are_remarks_and_an_event(tmp_path, file, events):
    odd = file.rename(tmp_path / "odd.safetensors")
    exported = fewbits.convert(odd, tmp_path / "out.npz", OneFile(allow=True))
    assert exported.remarks == dict.fromkeys(("a.weight", "b.weight", "a.bias", "embed.weight"), "is odd")
    assert [e["tensors"] for e in events if e["event"] == "obstacles_allowed"] == [exported.remarks]


# The command.


def test_the_command_prints_a_summary(directory, tmp_path, cli):
    code, out, err = cli("convert", directory, "-o", tmp_path / "out", "--format", "fewbits")
    assert (code, err) == (0, "")
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    expected = f"(fewbits): 2 quantized and 2 other tensors, {size:,} bytes, read back and equal\n"
    assert out == f"{tmp_path / 'out'} {expected}"


def test_the_command_prints_json_and_progress_as_events(directory, tmp_path, cli):
    code, out, err = cli("convert", directory, "-o", tmp_path / "out", "--format", "fewbits", "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed == {
        "path": str(tmp_path / "out"), "format": "fewbits", "quantized": 2, "kept": 2, "remarks": {},
        "nbytes": printed["nbytes"],
    }  # fmt: skip
    progress = [json.loads(line) for line in err.splitlines()]
    assert {event["activity"] for event in progress} == {"convert", "validate"}


def test_the_command_refuses_with_exit_code_2(directory, tmp_path, cli):
    before = names(tmp_path)
    code, out, err = cli("convert", directory, "-o", directory, "--format", "fewbits", "-q")
    assert (code, out) == (2, "")
    assert "is the source" in " ".join(err.split())
    code, _, err = cli("convert", directory, "-o", tmp_path / "out", "--format", "other")
    assert code == 2
    assert "'fewbits'" in err
    assert "'compressed-tensors'" in err
    assert names(tmp_path) == before


def test_the_command_replaces_on_request_and_splits_into_shards(directory, tmp_path, cli):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["convert", directory, "-o", tmp_path / "out", "--format", "fewbits", "-q"]
    assert cli(*arguments)[0] == 2
    assert cli(*arguments, "--replace", "--max-shard-size", "2kB")[0] == 0
    assert "model.safetensors.index.json" in names(tmp_path / "out")
    assert "mine.txt" not in names(tmp_path / "out")
