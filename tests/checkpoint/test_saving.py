"""Saving: the same bytes every time, all of them or none."""

import contextlib
import errno
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fewbits
from fewbits.checkpoint import safetensors as writing
from fewbits.checkpoint.digests import digest
from support.checkpoints import AnyScheme, metadata_of, save, split, state
from support.lifecycle_helpers import quantize_small, small, visible

SCHEMES = {
    "int8": small,
    "int8-tensor": lambda: small(fewbits.Int8PerTensor),
    "int4": lambda: small(fewbits.Int4Grouped, group_size=64),
    "int4-asymmetric": lambda: small(fewbits.Int4Grouped, group_size=48, symmetric=False),
    "int3": lambda: AnyScheme(fewbits.QuantSpec(3, "group", group_size=50, symmetric=False)),
    "fp16": lambda: small(fewbits.FP16Cast),
}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return SCHEMES[request.param]


def untied():
    return {name: tensor.clone() for name, tensor in state().items()}


@pytest.fixture
def source(tmp_path):
    """A checkpoint on disk, in a directory of its own."""
    path = tmp_path / "source" / "in.safetensors"
    path.parent.mkdir()
    safetensors.torch.save_file(untied(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Where results go, with nothing else in it."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def test_the_payload_is_the_sum_of_the_ledger_to_the_byte(folder, scheme):
    result = save(folder / "f", state(), scheme())
    header, payload = split((folder / "f").read_bytes())
    assert len(payload) == result.ledger.bytes_after == sum(row.bytes_after for row in result.ledger)
    for row in result.ledger:
        named = [name for name in header if name == row.name or name.startswith(f"{row.name}_")]
        sizes = [header[name]["data_offsets"] for name in named]
        assert sum(stop - start for start, stop in sizes) == row.bytes_after


def test_digests_are_the_sha256_of_every_tensor_in_the_file(folder, scheme):
    save(folder / "f", state(), scheme())
    header, payload = split((folder / "f").read_bytes())
    del header["__metadata__"]
    assert metadata_of(folder / "f")["digests"] == {
        name: hashlib.sha256(payload[slice(*entry["data_offsets"])]).hexdigest() for name, entry in header.items()
    }


def test_the_same_input_gives_the_same_file_anywhere(folder, scheme):
    (folder / "elsewhere").mkdir()
    save(folder / "f", state(), scheme())
    save(folder / "elsewhere" / "other name", state(), scheme())
    assert (folder / "f").read_bytes() == (folder / "elsewhere" / "other name").read_bytes()


def test_threads_do_not_change_the_file(folder, scheme):
    large = {"m.weight": torch.randn(700, 801, generator=torch.Generator().manual_seed(1))}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            save(folder / f"{count}", large, scheme())
    finally:
        torch.set_num_threads(threads)
    assert (folder / "1").read_bytes() == (folder / "2").read_bytes()


def test_strides_do_not_change_the_file(folder, scheme):
    weight = torch.randn(40, 130)
    save(folder / "rows first", {"m.weight": weight}, scheme())
    save(folder / "columns first", {"m.weight": weight.T.contiguous().T}, scheme())
    assert (folder / "rows first").read_bytes() == (folder / "columns first").read_bytes()


def test_the_order_of_a_mapping_does_not_change_the_file(folder, scheme):
    save(folder / "forwards", untied(), scheme())
    save(folder / "backwards", dict(reversed(untied().items())), scheme())
    assert (folder / "forwards").read_bytes() == (folder / "backwards").read_bytes()


def test_another_process_with_another_hash_seed_writes_the_same_file(folder, source):
    code = (
        f"import fewbits; fewbits.quantize({str(source)!r}, 'int8', min_elements=1, output={str(folder / 'theirs')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    quantize_small(source, "int8", output=folder / "ours")
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


def test_a_path_and_the_same_state_dict_in_memory_give_the_same_file(folder, source, scheme):
    quantize_small(source, scheme(), output=folder / "streamed", on_failure="ignore")
    save(folder / "in memory", safetensors.torch.load_file(source), scheme())
    assert (folder / "streamed").read_bytes() == (folder / "in memory").read_bytes()


def test_in_place_and_not_in_place_give_the_same_file(folder, scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 70), nn.Linear(70, 70), nn.LayerNorm(70))
    save(folder / "copied", model, scheme())
    save(folder / "in place", model, scheme(), inplace=True)
    assert (folder / "copied").read_bytes() == (folder / "in place").read_bytes()


def test_tied_tensors_are_stored_once_under_the_first_name(folder):
    save(folder / "f", state())
    header, _ = split((folder / "f").read_bytes())
    assert not [name for name in header if name.startswith("head")]
    loaded = fewbits.load(folder / "f")
    assert loaded.keys() == state().keys()
    assert loaded["head.weight"] is loaded["embeddings.weight"]


def test_a_file_may_be_replaced_by_what_was_loaded_from_it(folder):
    model = nn.Sequential(nn.Linear(70, 40), nn.LayerNorm(40))
    save(folder / "f", model)
    plain = fewbits.dequantize(fewbits.load(folder / "f", into=nn.Sequential(nn.Linear(70, 40), nn.LayerNorm(40))))
    norm = plain[1].weight.clone()
    save(folder / "f", plain, "int4", group_size=35)
    again = fewbits.load(folder / "f")
    assert again["0.weight"].spec.bits == 4
    assert torch.equal(again["1.weight"], norm)


def test_a_streamed_result_may_be_saved_over_its_own_file(folder, source):
    result = quantize_small(source, "int8", output=folder / "f")
    before = (folder / "f").read_bytes()
    result.save(folder / "f")
    assert (folder / "f").read_bytes() == before


@pytest.mark.parametrize("link", ["itself", "dotted", "symlink", "hard link"])
def test_a_source_is_never_its_own_output(source, link):
    output = source.parent / "out.safetensors"
    if link == "itself":
        output = source
    elif link == "dotted":
        output = source.parent / ".." / source.parent.name / source.name
    elif link == "symlink":
        output.symlink_to(source)
    else:
        output.hardlink_to(source)
    entries, before = set(source.parent.iterdir()), source.read_bytes()
    with pytest.raises(fewbits.errors.ArgumentError, match="source itself"):
        quantize_small(source, "int8", output=output)
    assert source.read_bytes() == before
    assert set(source.parent.iterdir()) == entries


WRITERS = {
    "mapping": lambda source, path: quantize_small(untied(), "int8", validate=False).save(path),
    "path": lambda source, path: quantize_small(source, "int8", output=path),
}


# Failures while a file is written: the old file stays, and no other file is left.


class FullDisk(io.FileIO):
    def write(self, data):
        if self.tell() + len(data) > 5000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


class Stingy(io.FileIO):
    def write(self, data):
        return super().write(memoryview(data)[:777])


class Forgetful(io.FileIO):
    """Claims to have written the last byte of everything, and wrote another."""

    def write(self, data):
        super().write(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
        return len(data)


def opens(monkeypatch, kind):
    monkeypatch.setattr(writing, "open", lambda path, mode, buffering: kind(path, mode.strip("b")), raising=False)


def fails(monkeypatch, name, number=errno.EIO):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fail)


@contextlib.contextmanager
def small_files_only():
    """The system itself refuses files beyond 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BREAKAGES = {
    "the disk is full": lambda patch: opens(patch, FullDisk),
    "fsync fails": lambda patch: fails(patch, "fsync"),
    "rename fails": lambda patch: fails(patch, "replace", errno.EXDEV),
    "the file cannot be made as long as it must be": lambda patch: fails(patch, "truncate", errno.EFBIG),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("old", [b"the old file", None])
def test_a_failure_of_the_system_leaves_the_old_file_and_nothing_else(folder, source, monkeypatch, breakage, kind, old):
    if old is not None:
        (folder / "f").write_bytes(old)
    BREAKAGES[breakage](monkeypatch)
    with pytest.raises(fewbits.errors.CheckpointError, match="results/f"):
        WRITERS[kind](source, folder / "f")
    assert visible(folder) == ([] if old is None else ["f"])
    assert old is None or (folder / "f").read_bytes() == old
    assert kind == "path" or len(visible(folder)) == len(os.listdir(folder))


def test_a_limit_of_the_system_on_file_size_leaves_nothing_behind(folder):
    result = quantize_small(untied(), "int8")
    with small_files_only(), pytest.raises(fewbits.errors.CheckpointError, match="results/f"):
        result.save(folder / "f")
    assert not list(folder.iterdir())


def test_a_write_that_takes_only_a_part_is_continued(folder, monkeypatch):
    save(folder / "at once", state())
    opens(monkeypatch, Stingy)
    save(folder / "in bits", state())
    assert (folder / "in bits").read_bytes() == (folder / "at once").read_bytes()


def test_a_disk_that_loses_bytes_is_found_out(folder, monkeypatch):
    result = quantize_small(untied(), "int8")
    opens(monkeypatch, Forgetful)
    with pytest.raises(fewbits.errors.CheckpointError):
        result.save(folder / "f")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_half_way_leaves_the_old_file_and_nothing_else(folder, source, error):
    steps = []

    def interrupted(step):
        steps.append(step)
        if len(steps) == 6:
            raise error

    (folder / "f").write_bytes(b"the old file")
    with pytest.raises(error):
        quantize_small(source, "int8", output=folder / "f", progress=interrupted)
    assert (visible(folder), (folder / "f").read_bytes()) == (["f"], b"the old file")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_quantized_leave_nothing_behind(folder, source, bad):
    tensors = safetensors.torch.load_file(source)
    tensors["layers.1.weight"][3, 2, 1, 0] = bad
    safetensors.torch.save_file(tensors, source)
    with pytest.raises(fewbits.errors.NonFiniteError, match=r"layers\.1\.weight.*\(3, 2, 1, 0\)"):
        quantize_small(source, "int8", output=folder / "f")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda folder: folder, id="a directory"),
        pytest.param(lambda folder: folder / "missing" / "f", id="in a missing directory"),
        pytest.param(lambda folder: folder.parent / "source" / "in.safetensors" / "f", id="below a file"),
        pytest.param(lambda folder: folder / ("x" * 300), id="a name too long"),
        pytest.param(lambda folder: folder / "nul\0", id="a NUL in the name"),
        pytest.param(lambda folder: "", id="empty"),
        pytest.param(lambda folder: "/proc/f", id="where nothing can be created"),
    ],
)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_place_that_cannot_be_written_is_a_named_error(folder, source, place, kind):
    with pytest.raises((fewbits.errors.CheckpointError, fewbits.errors.ArgumentError)):
        WRITERS[kind](source, place(folder))
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_a_named_error(folder):
    result = quantize_small(untied(), "int8")
    folder.chmod(0o500)
    try:
        with pytest.raises(fewbits.errors.CheckpointError, match="Permission denied"):
            result.save(folder / "f")
    finally:
        folder.chmod(0o700)


def test_the_longest_name_that_the_system_allows_can_be_written(folder):
    save(folder / ("x" * 255), state())
    fewbits.load(folder / ("x" * 255))


@pytest.mark.parametrize("old", [b"the old file", None])
def test_a_killed_process_leaves_nothing_at_the_target(folder, source, old):
    code = f"""
        import fewbits, sys, time
        steps = []
        def stuck(step):
            steps.append(step)
            if len(steps) == 6:
                print("half-way", flush=True)
                time.sleep(100)
        fewbits.quantize({str(source)!r}, "int8", min_elements=1, output={str(folder / "f")!r}, progress=stuck)
    """
    if old is not None:
        (folder / "f").write_bytes(old)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert ((folder / "f").read_bytes() if (folder / "f").exists() else None) == old
    for leftover in [path for path in folder.rglob("*") if path.name != "f" or path.parent != folder]:
        with pytest.raises(fewbits.errors.CheckpointError):
            fewbits.load(leftover)
    quantize_small(source, "int8", output=fewbits.Output(folder / "f", resume=True))
    fewbits.load(folder / "f")
    assert os.listdir(folder) == ["f"]


def test_a_model_that_changed_since_it_was_quantized_is_refused(folder):
    result = quantize_small(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), "int8")
    result.model[1].weight = nn.Parameter(torch.ones(5))
    with pytest.raises(fewbits.errors.CheckpointError, match=r"1\.weight"):
        result.save(folder / "f")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("make", [Tensor.t, lambda t: t[::2], lambda t: t.expand(3, *t.shape)], ids="tse")
def test_a_digest_is_that_of_the_bytes_in_order_whatever_the_strides(make):
    tensor = make(torch.arange(60000.0).reshape(200, 300))
    assert digest(tensor) == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
