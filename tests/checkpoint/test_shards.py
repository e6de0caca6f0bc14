"""Results in several files: every tensor in one of them, the same bytes as in one, and no mixture of two results."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fewbits
from fewbits._sizes import parse_size
from fewbits.checkpoint.shards import plan_shards
from fewbits.testing.environment import snapshot
from support.checkpoints import save, split, state
from support.lifecycle_helpers import TiedLM, files_in, quantize_small

INDEX = "model.safetensors.index.json"


@st.composite
def ledgers(draw):
    """Ledgers of kept tensors of many sizes, some of them empty, some of them aliases of any other."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    rows = []
    for index, size in enumerate(sizes):
        rows.append(
            fewbits.LedgerRow(
                f"t{index:02d}", (size,), torch.uint8, "kept", "it is", bytes_before=size, bytes_after=size
            )
        )
    for index in draw(st.lists(st.integers(0, len(sizes) - 1), max_size=3, unique=True)):
        rows.append(
            fewbits.LedgerRow(
                f"a{index:02d}", (sizes[index],), torch.uint8, "alias", "it is", 0, 0, alias_of=f"t{index:02d}"
            )
        )
    return fewbits.Ledger(draw(st.permutations(rows)))


@given(ledgers(), st.integers(1, 60))
def test_shards_hold_every_row_once_in_order_and_are_as_full_as_they_can_be(ledger, most):
    shards = plan_shards(ledger, most, ".x")
    assert [row for shard in shards for row in shard.ledger.stored] == ledger.stored
    assert sum(len(shard.ledger) for shard in shards) == len(ledger)
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        sizes = [row.bytes_after for row in shard.ledger.stored]
        assert sum(sizes) <= most or sum(map(bool, sizes)) == 1
        if after is not None:
            assert sum(sizes) + after.ledger.stored[0].bytes_after > most
    names = [shard.file for shard in shards]
    assert names == sorted(set(names))
    assert len(shards) > 1 or names == ["model.x"]


@pytest.fixture
def sharded(tmp_path):
    """A result in several files, and the same in one."""
    result = save(tmp_path / "one.safetensors", state(), "int8")
    result.save(tmp_path / "many", max_shard_size=2000)
    return tmp_path / "many"


def test_many_files_hold_what_one_file_holds(sharded, tmp_path):
    one = fewbits.load(tmp_path / "one.safetensors")
    many = fewbits.load(sharded)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert snapshot(many) == snapshot(one)
    assert many["head.weight"] is many["embeddings.weight"]
    assert fewbits.verify(sharded, state()).ok


def test_the_index_is_the_one_that_other_readers_know(sharded):
    index = json.loads((sharded / INDEX).read_text())
    headers = {path.name: split(path.read_bytes())[0] for path in sharded.glob("*.safetensors")}
    assert index["weight_map"] == {
        name: file for file, header in headers.items() for name in header if name != "__metadata__"
    }
    payload = sum(len(split(path.read_bytes())[1]) for path in sharded.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == payload


def test_the_index_itself_and_each_file_can_be_opened(sharded):
    whole = fewbits.load(sharded / INDEX)
    parts = {
        name: value for path in sorted(sharded.glob("*.safetensors")) for name, value in fewbits.load(path).items()
    }
    assert snapshot(parts) == snapshot(whole)


def test_a_model_is_saved_in_many_files_and_loaded(tmp_path):
    result = quantize_small(TiedLM(), "int8")
    result.save(tmp_path / "model", max_shard_size="1 kB")
    with torch.device("meta"):
        model = TiedLM()
    loaded = fewbits.load(tmp_path / "model", into=model)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids), result.model(ids))
    assert loaded.lm_head.weight_stored is loaded.embed_tokens.weight_stored


def test_what_fits_into_one_file_has_no_index(tmp_path):
    quantize_small(state(), "int8").save(tmp_path / "model", max_shard_size="1GB")
    assert os.listdir(tmp_path / "model") == ["model.safetensors"]
    assert len(fewbits.load(tmp_path / "model")) == len(state())


def test_the_same_result_gives_the_same_files(sharded, tmp_path):
    save(tmp_path / "again", state(), "int8")
    quantize_small(state(), "int8", on_failure="ignore").save(tmp_path / "other", max_shard_size=2000)
    assert files_in(sharded) == files_in(tmp_path / "other")


@pytest.mark.parametrize("size", [0, -1, "", "5 parsecs", 1.5, True, "0", "-3GB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    result = quantize_small(state(), "int8")
    with pytest.raises(fewbits.errors.ArgumentError, match="max_shard_size must be"):
        result.save(tmp_path / "model", max_shard_size=size)
    assert not files_in(tmp_path)


def test_sizes_are_read_as_people_write_them():
    texts = ["512MB", "512 mb", "0.5GiB", "5gb", "1TB", "12", "7B", "2 KiB"]
    assert [parse_size(text, "size") for text in texts] == [
        512 * 10**6, 512 * 10**6, 2**29, 5 * 10**9, 10**12, 12, 7, 2048,
    ]  # fmt: skip


def test_a_directory_with_files_in_it_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("precious")
    result = quantize_small(state(), "int8")
    for path, message in [(tmp_path / "model", "a directory with files"), (tmp_path / "model" / "mine", "is a file")]:
        with pytest.raises(fewbits.errors.ArgumentError, match=message):
            result.save(path, max_shard_size=2000)
    assert files_in(tmp_path / "model") == {"mine": b"precious"}


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    quantize_small(state(), "int8").save(tmp_path / "model", max_shard_size=2000)
    assert fewbits.verify(tmp_path / "model").ok
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_in_any_file_leaves_nothing(tmp_path, monkeypatch):
    result = quantize_small(state(), "int8")
    write, calls = fewbits.checkpoint.saving.CheckpointWriter.append, []

    def failing(self, chunk, value):
        calls.append(chunk.row.name)
        if len(calls) == 4:
            raise InterruptedError("the disk is full")
        write(self, chunk, value)

    monkeypatch.setattr(fewbits.checkpoint.saving.CheckpointWriter, "append", failing)
    with pytest.raises(InterruptedError):
        result.save(tmp_path / "model", max_shard_size=2000)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_renamed_gives_the_old_one_back(tmp_path):
    for folder in ("model", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "content").write_text(folder)
    move = fewbits.checkpoint.publishing.move_into_place
    with pytest.raises(fewbits.errors.CheckpointError):
        move(tmp_path, tmp_path / "model", replace=True)  # no directory can be moved into itself
    assert files_in(tmp_path / "model") == {"content": b"model"}
    move(tmp_path / "new", tmp_path / "model", replace=True)
    assert files_in(tmp_path / "model") == {"content": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def other_result(sharded):
    quantize_small(state(seed=1), "int8").save(sharded.parent / "other", max_shard_size=2000)
    return sharded.parent / "other"


def edit_index(sharded, edit):
    index = json.loads((sharded / INDEX).read_text())
    edit(index)
    (sharded / INDEX).write_text(json.dumps(index))


def first(index):
    return next(iter(index["weight_map"]))


BROKEN = {
    "a file is missing": (lambda d: next(d.glob("*-00002-of-*")).unlink(), "files that are missing: model-00002-of-"),
    "a file of another result": (
        lambda d: shutil.copy(next(other_result(d).glob("*-00002-of-*")), d),
        "the index was written for other files",
    ),
    "another index": (lambda d: shutil.copy(other_result(d) / INDEX, d), "the index was written for other files"),
    "a tensor elsewhere": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update({first(i): max(i["weight_map"].values())})),
        "is not in the file that the index names",
    ),
    "a tensor too many": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(more=i["weight_map"][first(i)])),
        "more is not in the file",
    ),
    "a tensor too few": (lambda d: edit_index(d, lambda i: i["weight_map"].pop(first(i))), "is not in the file"),
    "no map": (lambda d: edit_index(d, lambda i: i.pop("weight_map")), "no weight_map"),
    "an empty map": (lambda d: edit_index(d, lambda i: i["weight_map"].clear()), "no weight_map"),
    "no metadata": (lambda d: edit_index(d, lambda i: i.pop("metadata")), "has format version None"),
    "metadata of another kind": (lambda d: edit_index(d, lambda i: i.update(metadata=[1])), "no weight_map"),
    "a number for a file": (lambda d: edit_index(d, lambda i: i["weight_map"].update(x=3)), "names '3'"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), "no JSON"),
    "a list": (lambda d: (d / INDEX).write_text("[]"), "does not begin with {"),
    "a key twice": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), "'a' is in its index"),
    "nested too deep": (lambda d: (d / INDEX).write_text('{"a":' * 100_000), "no JSON"),
    "two indexes": (lambda d: shutil.copy(d / INDEX, d / "other.safetensors.index.json"), "has 2 indexes"),
    "no index": (lambda d: (d / INDEX).unlink(), "files of tensors and no index"),
}  # fmt: skip


BROKEN |= {
    "another version": (
        lambda d: edit_index(d, lambda i: i["metadata"].update({"fewbits.format_version": "99"})),
        "has format version 99",
    ),
    "another size": (
        lambda d: edit_index(d, lambda i: i["metadata"].update(total_size=-5)),
        "the index was written for other files",
    ),
    "a directory for an index": (lambda d: ((d / INDEX).unlink(), (d / INDEX).mkdir()), "it is no index"),
    "a link to nothing": (lambda d: ((d / INDEX).unlink(), (d / INDEX).symlink_to(d / "nothing")), "it is no index"),
    "a link in a circle": (
        lambda d: ((d / INDEX).unlink(), (d / INDEX).symlink_to(d / INDEX)),
        "it is no index|cannot be read",
    ),
    "a link to elsewhere": (
        lambda d: ((d / INDEX).rename(d.parent / INDEX), (d / INDEX).symlink_to(d.parent / INDEX)),
        "is a link to",
    ),
    "a pipe for an index": (lambda d: ((d / INDEX).unlink(), os.mkfifo(d / INDEX)), "it is no index"),
    "a name that no file can have": (
        lambda d: edit_index(d, lambda i: i["weight_map"].update(x=300 * "a" + ".safetensors")),
        "missing|cannot be read",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_do_not_belong_together_are_refused(sharded, how):
    damage, message = BROKEN[how]
    damage(sharded)
    for read in (fewbits.load, fewbits.verify):
        with pytest.raises(fewbits.errors.CheckpointError, match=message):
            read(sharded)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", ".",
                                  "", "c:\\b.safetensors", "passwd", "model.safetensors\0"])  # fmt: skip
def test_an_index_names_nothing_outside_of_its_directory(sharded, file):
    edit_index(sharded, lambda index: index["weight_map"].update(x=file))
    with pytest.raises(fewbits.errors.CheckpointError) as refused:
        fewbits.load(sharded)
    assert repr(file) in str(refused.value) or "cannot be read" in str(refused.value)


def test_a_link_that_leaves_the_directory_is_refused(sharded, tmp_path):
    path = next(sharded.glob("*-00001-of-*"))
    path.rename(tmp_path / "outside.safetensors")
    path.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(fewbits.errors.FormatError, match=r"is a link to .*outside of its directory"):
        fewbits.load(sharded)


def test_links_as_in_the_cache_of_a_hub_are_followed(sharded, tmp_path):
    repository = tmp_path / "models--some--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0123abc").mkdir(parents=True)
    for index, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, repository / "blobs" / str(index))
        (repository / "snapshots" / "0123abc" / path.name).symlink_to(f"../../blobs/{index}")
    assert snapshot(fewbits.load(repository / "snapshots" / "0123abc")) == snapshot(fewbits.load(sharded))


def test_a_flipped_byte_in_any_file_names_its_tensor(sharded):
    for path in sharded.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    report = fewbits.verify(sharded)
    assert len(report.failures) == len(list(sharded.glob("*.safetensors")))
    with pytest.raises(fewbits.errors.DigestError):
        fewbits.load(sharded)


def test_a_directory_without_tensors_says_what_was_looked_for(tmp_path):
    with pytest.raises(fewbits.errors.FormatError, match=r"without a file whose name ends in \.safetensors"):
        fewbits.load(tmp_path)


def test_a_layer_of_a_sharded_model_says_where_it_was_not_found(sharded):
    with pytest.raises(fewbits.errors.MismatchError):
        fewbits.load(sharded, into=nn.Linear(2, 2))
