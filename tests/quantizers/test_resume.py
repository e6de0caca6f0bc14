"""An interrupted run and a second run that resumes it: the same bytes in every case."""

import contextlib
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import shutil

import pytest
import safetensors.torch
import torch
from file_cases import SCHEMES, checkpoint
from hypothesis import example, given
from hypothesis import strategies as st

import fewbits
from fewbits.checkpoint.raw import FileBytes
from fewbits.numerics.metrics import Tally
from support.checkpoints import write_shards
from support.lifecycle_helpers import (
    FEWER_EXAMPLES,
    JsonSerializer,
    files_in,
    quantize_small,
    small,
    visible,
)


class Stopped(BaseException):
    """Ends a run like a signal: no handler catches it."""


def stop_at(moment):
    """A `progress` that ends the run at one step."""
    steps = []

    def stop(step):
        if step.activity == "convert":
            steps.append(step)
            if len(steps) > moment:
                raise Stopped

    return stop


@contextlib.contextmanager
def cut(chunk, block=100):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.numerics.layout.BLOCK_ELEMENTS", block)
        patch.setattr("fewbits.checkpoint.chunks.CHUNK_ELEMENTS", chunk * block)
        yield


def staging_directory(folder):
    (found,) = [path for path in folder.iterdir() if path.name.endswith(".work")]
    return found


def notes(folder):
    """The notes of all journals, one for each written chunk."""
    lines = [
        line
        for path in sorted((staging_directory(folder) / "journal").iterdir())
        for line in path.read_text().splitlines()
    ]
    return [note for note in map(json.loads, lines) if "tensor" in note]


def nbytes(done):
    return sum((note["stop"] - note["start"]) * checkpoint()[note["tensor"]].element_size() for note in done)


def run(source, target, scheme="int8", progress=None, **how):
    quantizer = SCHEMES[scheme]()
    how.setdefault("max_shard_size", 12_000)
    output = fewbits.Output(target, **how)
    with contextlib.suppress(Stopped):
        fewbits.quantize(
            source, quantizer, output=output, on_failure="ignore", **({"progress": progress} if progress else {})
        )
        return quantizer.shares
    return None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("source") / "model", checkpoint(), 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    """The files of an uninterrupted run, by scheme."""
    made = {}

    def make(scheme):
        if scheme not in made:
            folder = tmp_path_factory.mktemp("whole")
            with cut(7):
                run(source, folder / "out", scheme)
            made[scheme] = files_in(folder / "out")
        return made[scheme]

    return make


DAMAGE = {
    "nothing": lambda folder, dice: None,
    "a line that is torn": lambda folder, dice: _shorten(_any(folder / "journal", dice), dice),
    "a file that is too short": lambda folder, dice: _shorten(_any(folder / "files", dice), dice),
    "a flipped bit": lambda folder, dice: _flip(_any(folder / "files", dice), dice),
    "a flipped bit in a journal": lambda folder, dice: _flip(_any(folder / "journal", dice), dice),
    "a file that is gone": lambda folder, dice: _any(folder / "files", dice).unlink(),
    "a journal that is gone": lambda folder, dice: _any(folder / "journal", dice).unlink(),
    "something in between": lambda folder, dice: (folder / "files" / "config.json").write_text("half of it"),
}


def _any(folder, dice):
    return dice.choice(sorted(folder.iterdir()))


def _shorten(path, dice):
    os.truncate(path, dice.randint(0, path.stat().st_size))


def _flip(path, dice):
    data = bytearray(path.read_bytes())
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


@FEWER_EXAMPLES
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    moments=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    threads=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    damage=st.sampled_from(list(DAMAGE)),
    seed=st.integers(0, 10),
)
# A convolution with one scale: begun in small chunks, continued with room for all of it.
@example("int3-tensor", [27], 1, [1, 1, 1, 35], "a line that is torn", 1)
def test_a_resumed_run_gives_the_same_bytes(
    tmp_path_factory, source, whole, scheme, moments, threads, chunks, damage, seed
):
    folder = tmp_path_factory.mktemp("out")
    for moment, chunk in zip(moments, chunks, strict=False):
        with cut(chunk):
            shares = run(source, folder / "out", scheme, stop_at(moment), resume=True, threads=threads)
        if shares is not None:
            break
        if list(folder.glob(".*.work")):
            DAMAGE[damage](staging_directory(folder), random.Random(seed))
    else:
        with cut(chunks[-1]):
            run(source, folder / "out", scheme, resume=True, threads=threads)
    assert os.listdir(folder) == ["out"]
    assert files_in(folder / "out") == whole(scheme)


@pytest.mark.parametrize("scheme", ["int8-tensor", "int8-tensor-mse"])
def test_a_run_that_continues_with_larger_chunks_keeps_the_scale_of_the_whole_tensor(tmp_path, source, whole, scheme):
    with cut(19):
        run(source, tmp_path / "out", scheme, stop_at(35), resume=True, threads=1)
    (last, *_) = reversed(notes(tmp_path))
    assert 0 < last["stop"] < checkpoint()[last["tensor"]].numel()  # it stopped within a tensor
    with cut(1000):
        run(source, tmp_path / "out", scheme, resume=True)
    assert files_in(tmp_path / "out") == whole(scheme)


@FEWER_EXAMPLES
@given(scheme=st.sampled_from(["int8", "int8-tensor", "int4-mse", "custom"]), moment=st.integers(0, 250))
def test_nothing_is_converted_twice(tmp_path_factory, source, scheme, moment):
    folder = tmp_path_factory.mktemp("out")
    with cut(3):
        if run(source, folder / "out", scheme, stop_at(moment), threads=2) is None and list(folder.glob(".*.work")):
            done = nbytes(notes(folder))
            (share,) = run(source, folder / "out", scheme, resume=True, threads=2)
            assert share.resumed == done
            assert share.converted == sum(tensor.nbytes for tensor in checkpoint().values()) - done


@pytest.mark.parametrize("moment", range(3, 75, 6))
def test_no_loader_accepts_an_unfinished_result(tmp_path, source, moment):
    with cut(10):
        run(source, tmp_path / "out", "int8", stop_at(moment))
    assert visible(tmp_path) == []
    files = staging_directory(tmp_path) / "files"
    for path in (tmp_path / "out", tmp_path, staging_directory(tmp_path), files):
        with pytest.raises(fewbits.errors.CheckpointError):
            fewbits.load(path)
    sealed = {
        path.stem for path in (staging_directory(tmp_path) / "journal").iterdir() if '"header"' in path.read_text()
    }
    for path in files.iterdir():
        if path.name not in sealed:
            with pytest.raises(fewbits.errors.FormatError):
                fewbits.load(path)
            with pytest.raises(safetensors.SafetensorError):
                safetensors.torch.load_file(path)


@pytest.fixture
def begun(tmp_path):
    """A source that tests may change, after a run that stopped halfway."""
    source = write_shards(tmp_path / "model", checkpoint(), 2)
    (source / "config.json").write_text("{}")
    with cut(10):
        assert run(source, tmp_path / "out", "int8", stop_at(60)) is None
    return source


def retouch(path, data=None):
    """Change a file and its modification time, which a coarse clock might not change."""
    before = path.stat()
    path.write_bytes(path.read_bytes() if data is None else data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


CHANGES = {
    "source: model-00002-of-00002.safetensors (time of change)": lambda source: retouch(
        source / "model-00002-of-00002.safetensors"
    ),
    "source: config.json (size, time of change)": lambda source: retouch(source / "config.json", b"{ }"),
    "source: added.json": lambda source: (source / "added.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_refused(tmp_path, begun, change):
    CHANGES[change](begun)
    before = files_in(tmp_path)
    with pytest.raises(fewbits.errors.ArgumentError, match=re.escape(f"{change} changed")):
        run(begun, tmp_path / "out", resume=True)
    assert files_in(tmp_path) == before
    run(begun, tmp_path / "out", replace=True)
    assert visible(tmp_path) == ["model", "out"]


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"scheme": "int4"}, "fates of tensors"),
        ({"scheme": "int8-scales"}, "fates of tensors"),
        ({"scheme": "int8", "max_shard_size": 30_000}, "files of the result"),
    ],
)
def test_changed_settings_are_refused(tmp_path, begun, recipe, why):
    with pytest.raises(fewbits.errors.ArgumentError, match=f"its inputs changed.*{why}"):
        run(begun, tmp_path / "out", resume=True, **recipe)


class Scaled(fewbits.Int8PerChannel):
    """A scheme with a setting that does not show in the ledger."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def quantize_tensor(self, weight, spec, observer):
        return super().quantize_tensor(weight, spec, observer)


@pytest.mark.parametrize(("factor", "alike"), [(1.0, True), (1.5, False), (lambda: 1.0, False)])
def test_a_changed_attribute_of_a_scheme_is_refused(tmp_path, source, factor, alike):
    """Two functions cannot be compared."""
    first = factor if callable(factor) else 1.0
    with pytest.raises(Stopped):
        fewbits.quantize(source, Scaled(first), output=tmp_path / "out", progress=stop_at(10))
    refused = contextlib.nullcontext() if alike else pytest.raises(fewbits.errors.ArgumentError, match="scheme")
    with refused:
        fewbits.quantize(source, Scaled(factor), output=fewbits.Output(tmp_path / "out", resume=True))


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        (fewbits.MSEObserver(), fewbits.MSEObserver(), True),
        (fewbits.MinMaxObserver(), fewbits.MSEObserver(), False),
        (fewbits.PercentileObserver(99.0), fewbits.PercentileObserver(99.5), False),
    ],
    ids=["alike", "another class", "another setting"],
)
def test_another_observer_is_refused(tmp_path, source, first, second, alike):
    with pytest.raises(Stopped):
        fewbits.quantize(source, "int8", observer=first, output=tmp_path / "out", min_elements=1, progress=stop_at(10))
    again = fewbits.Output(tmp_path / "out", resume=True)
    if alike:
        fewbits.quantize(source, "int8", observer=second, output=again, min_elements=1)
    else:
        with pytest.raises(fewbits.errors.ArgumentError, match="scheme"):
            fewbits.quantize(source, "int8", observer=second, output=again, min_elements=1)


def test_another_release_is_refused(tmp_path, begun, monkeypatch):
    monkeypatch.setattr("fewbits.conversion.coordinator.__version__", "99.0")
    with pytest.raises(fewbits.errors.ArgumentError, match=r"fewbits was .*, is 99\.0"):
        run(begun, tmp_path / "out", resume=True)


def touched_at(path, stop):
    """Change a file during a run, which continues or is interrupted."""

    def progress(step):
        if step.done > 60_000:
            retouch(path)
            if stop:
                raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("stop", [True, False])
def test_a_source_that_changes_during_a_run_is_reported_with_advice_to_start_over(tmp_path, stop):
    source = write_shards(tmp_path / "model", checkpoint(), 2)
    progress = touched_at(source / "model-00002-of-00002.safetensors", stop)
    with cut(10), pytest.raises((fewbits.errors.CheckpointError, KeyboardInterrupt)) as ended:
        run(source, tmp_path / "out", progress=progress)
    assert "the run cannot be resumed: start over (--replace" in str(ended.value)
    assert "--resume" not in str(ended.value)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"cannot resume .*: its inputs changed: source"):
        run(source, tmp_path / "out", resume=True)
    assert run(source, tmp_path / "out", replace=True)


def test_a_run_can_be_resumed_after_its_source_was_unreadable(tmp_path):
    source = write_shards(tmp_path / "model", checkpoint(), 2)

    def away(step):
        if step.done > 60_000 and source.exists():
            source.rename(tmp_path / "away")

    with cut(10), pytest.raises(fewbits.errors.CheckpointError, match="finished work is kept: continue with --resume"):
        run(source, tmp_path / "out", progress=away)
    (tmp_path / "away").rename(source)
    (share,) = run(source, tmp_path / "out", resume=True)
    assert share.resumed > 0


def test_an_unfinished_run_is_neither_removed_nor_resumed_unasked(tmp_path, begun):
    before = files_in(tmp_path)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"--resume.*--replace"):
        run(begun, tmp_path / "out")
    assert files_in(tmp_path) == before
    (share,) = run(begun, tmp_path / "out", replace=True)
    assert share.resumed == 0


def test_a_complete_result_is_compared_with_its_source(tmp_path, source):
    (first,) = run(source, tmp_path / "out")
    before = files_in(tmp_path / "out")
    (share,) = run(source, tmp_path / "out", resume=True)
    assert (share.converted, share.resumed) == (0, first.converted)
    assert files_in(tmp_path) == {f"out/{name}": data for name, data in before.items()}


@pytest.mark.parametrize("other", ["another source", "another scheme", "damage", "nothing of ours"])
def test_a_complete_result_that_differs_is_refused(tmp_path, source, other):
    run(source, tmp_path / "out")
    scheme = "int8"
    if other == "another source":
        tensors = {name: tensor if name == "ids" else -tensor for name, tensor in checkpoint().items()}
        source = write_shards(tmp_path / "other", tensors, 3)
    elif other == "another scheme":
        scheme = "int4"
    else:
        path = next(path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"x" if other == "damage" else b"{}")
    with pytest.raises(fewbits.FewbitsError):
        run(source, tmp_path / "out", scheme, resume=True)


def test_resume_without_an_earlier_run_starts_one(tmp_path, source, whole):
    (share,) = run(source, tmp_path / "out", resume=True)
    assert share.resumed == 0


def test_nonfinite_numbers_leave_no_unfinished_run(tmp_path):
    tensors = checkpoint()
    tensors["wide.weight"][0, 5] = float("nan")
    source = write_shards(tmp_path / "model", tensors, 2)
    with pytest.raises(fewbits.errors.NonFiniteError):
        run(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_a_format_without_resumable_files_keeps_its_complete_files(tmp_path, source):
    def convert(serializer, progress=None, **how):
        quantizer = small(serializer=serializer)
        quantizer.prepare(source)
        how = {"progress": progress} if progress else {}
        quantizer.convert(output=fewbits.Output(tmp_path / "out", max_shard_size=12_000, resume=True), **how)
        return quantizer.shares

    first, second = JsonSerializer(), JsonSerializer()
    with cut(10), pytest.raises(Stopped):
        convert(first, stop_at(60))
    assert first.written
    (share,) = convert(second)
    assert set(first.written).isdisjoint(second.written)
    assert len(first.written) + len(second.written) == len(share.files)
    assert 0 < share.resumed < share.converted + share.resumed


def _hold(source, target, ready, leave):
    def wait(step):
        ready.set()
        leave.wait(60)

    fewbits.quantize(source, "int8", output=target, progress=wait)


def test_two_processes_do_not_write_the_same_result(tmp_path, source):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(source, tmp_path / "out", ready, leave))
    process.start()
    try:
        assert ready.wait(60)
        for how in ({"resume": True}, {"replace": True}):
            with pytest.raises(fewbits.errors.CheckpointError, match="another process is at work"):
                fewbits.quantize(source, "int8", output=fewbits.Output(tmp_path / "out", **how))
    finally:
        leave.set()
        process.join(60)
    assert process.exitcode == 0
    assert fewbits.verify(tmp_path / "out", source).ok


def test_a_single_file_is_resumed_too(tmp_path, source):
    file = source / "model-00001-of-00003.safetensors"
    with cut(10):
        assert run(file, tmp_path / "one.safetensors", "int4", stop_at(20), max_shard_size=None) is None
    before = torch.random.get_rng_state()
    (share,) = run(file, tmp_path / "one.safetensors", "int4", resume=True, max_shard_size=None)
    assert share.resumed > 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_shard_size_with_the_same_number_of_files_is_refused(tmp_path):
    """The files have the same names and hold other tensors."""
    tensors = {f"{name}.weight": torch.randn(64, 64) for name in "abcde"}
    source = write_shards(tmp_path / "model", tensors, 1)
    sizes = [
        [
            len(shard.ledger)
            for shard in fewbits.plan(source, "int8", output=fewbits.Output("o", max_shard_size=most)).shards
        ]
        for most in (14_000, 17_700)
    ]
    assert sizes == [[3, 2], [4, 1]]
    with pytest.raises(Stopped):
        fewbits.quantize(
            source, "int8", output=fewbits.Output(tmp_path / "out", max_shard_size=14_000), progress=stop_at(7)
        )
    again = fewbits.Output(tmp_path / "out", max_shard_size=17_700, resume=True)
    with pytest.raises(fewbits.errors.ArgumentError, match="files of the result changed"):
        fewbits.quantize(source, "int8", output=again)


class Attached(fewbits.Int8PerChannel):
    """A scheme with an attribute and its own rounding."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def quantize_tensor(self, weight, spec, observer):
        return super().quantize_tensor(weight, spec, observer)


def _ring():
    ring = {"also": []}
    ring["also"] += [ring, (ring,)]
    return ring


@pytest.mark.parametrize(
    ("held", "alike"),
    [
        (_ring, True),
        (lambda: torch.nn.Linear(2, 2), False),
        (lambda: logging.getLogger("fewbits.of.somebody"), False),
        (lambda: torch.empty(3, device="meta"), False),
        (lambda: torch.eye(3).to_sparse(), False),
    ],
    ids=["a ring", "a module", "a logger", "a tensor without bytes", "a sparse tensor"],
)
def test_a_scheme_may_have_attributes_of_any_type(tmp_path, source, held, alike):
    with pytest.raises(Stopped):
        fewbits.quantize(source, Attached(held()), output=tmp_path / "out", progress=stop_at(10))
    refused = contextlib.nullcontext() if alike else pytest.raises(fewbits.errors.ArgumentError, match="scheme")
    with refused:
        fewbits.quantize(source, Attached(held()), output=fewbits.Output(tmp_path / "out", resume=True))


def _staging_directory_of(target):
    return target.parent / f".fewbits-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.work"


def _link(path, precious):
    if path.exists():
        path.unlink()
    path.symlink_to(precious)


FOREIGN = {
    "a link to a directory in its place": lambda work, precious: work.symlink_to(precious.parent),
    "a file of another program": lambda work, precious: (work.mkdir(), (work / "mine").write_text("mine")),
    "a directory of another program": lambda work, precious: (work / "mine").mkdir(parents=True),
}
FOREIGN_INSIDE = {
    "a link for a file": lambda work, precious: _link(next((work / "files").iterdir()), precious),
    "a link for a journal": lambda work, precious: _link(next((work / "journal").iterdir()), precious),
    "a link for the record": lambda work, precious: _link(work / "run.json", precious),
    "a link beside the files": lambda work, precious: _link(work / "files" / "config.json", precious),
    "a directory for a journal": lambda work, precious: _replaced(next((work / "journal").iterdir())).mkdir(),
    "a directory for a file": lambda work, precious: _replaced(next((work / "files").iterdir())).mkdir(),
    "a pipe for a journal": lambda work, precious: os.mkfifo(_replaced(next((work / "journal").iterdir()))),
}


def _replaced(path):
    path.unlink()
    return path


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"replace": True}], ids=str)
@pytest.mark.parametrize("what", [*FOREIGN, *FOREIGN_INSIDE])
def test_foreign_files_in_the_staging_directory_are_neither_removed_nor_changed(tmp_path, begun, what, how):
    precious = tmp_path / "precious" / "data"
    precious.parent.mkdir()
    precious.write_text("mine")
    work = staging_directory(tmp_path)
    if what in FOREIGN:
        shutil.rmtree(work)
        FOREIGN[what](work, precious)
    else:
        FOREIGN_INSIDE[what](work, precious)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(fewbits.errors.ArgumentError, match=r"out is made in .*, but no run has put .* there"):
        run(begun, tmp_path / "out", **how)
    assert precious.read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_in_the_staging_directory_is_refused(tmp_path):
    source = write_shards(_staging_directory_of(tmp_path / "out") / "files", checkpoint(), 1)
    before = files_in(tmp_path)
    with pytest.raises(fewbits.errors.ArgumentError, match=r"lies in .*, where the result is made"):
        run(source, tmp_path / "out")
    assert files_in(tmp_path) == before


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A source that is a single file, like its result."""
    path = tmp_path_factory.mktemp("one") / "model.safetensors"
    safetensors.torch.save_file(checkpoint(), path)
    return path


def test_a_file_may_have_the_longest_possible_name(tmp_path, one):
    target = tmp_path / ("n" * (255 - len(".safetensors")) + ".safetensors")
    with cut(10):
        assert run(one, target, progress=stop_at(50), max_shard_size=None) is None
    (share,) = run(one, target, resume=True, max_shard_size=None)
    assert share.resumed > 0


@pytest.mark.parametrize("single", [False, True])
def test_remains_of_a_published_run_are_not_an_unfinished_run(tmp_path, source, one, single, monkeypatch):
    """The run was killed after publishing, while it removed its directory."""
    target = tmp_path / "out.safetensors" if single else tmp_path / "out"
    how = {"max_shard_size": None} if single else {}

    def stop(path, complaint):
        if (path / "journal").exists():
            shutil.rmtree(path / "journal")
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("fewbits.conversion.staging.remove_tree", stop)
        assert run(one if single else source, target, **how) is None
    assert staging_directory(tmp_path)
    (share,) = run(one if single else source, target, resume=True, **how)
    assert share.converted == 0
    assert os.listdir(tmp_path) == [target.name]


def test_a_file_that_cannot_be_opened_again_is_not_lost(tmp_path, begun, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    done = nbytes(notes(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("fewbits.checkpoint.safetensors._SafetensorsWriter._begin", full)
        with pytest.raises(fewbits.errors.CheckpointError, match=r"No space left.*--resume"):
            run(begun, tmp_path / "out", resume=True)
    (share,) = run(begun, tmp_path / "out", resume=True)
    assert share.resumed == done


def test_a_directory_that_cannot_be_replaced_is_refused_before_anything_is_done(tmp_path, source, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: os.fspath(path) == str(tmp_path / "out"))
    with pytest.raises(fewbits.errors.ArgumentError, match="is where a file system is mounted"):
        run(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_no_run_starts_over_while_another_process_still_writes(tmp_path, begun):
    """The first process has failed, and a second one has not noticed yet."""
    output = fewbits.Output(tmp_path / "out", resume=True, max_shard_size=12_000)
    quantizer = SCHEMES["int8"]()
    quantizer.prepare(begun)
    other = quantizer.share(output)
    other.join()
    try:
        with pytest.raises(fewbits.errors.CheckpointError, match="out: another process is at work"):
            run(begun, tmp_path / "out", replace=True)
    finally:
        other.release()
    run(begun, tmp_path / "out", resume=True)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_that_was_created_during_the_run_is_not_replaced_unasked(tmp_path, one, earlier):
    """A file that existed when the run began is replaced."""
    target = tmp_path / "out.safetensors"
    how = {"max_shard_size": None}
    if earlier:
        target.write_text("earlier")
    with cut(10):
        assert run(one, target, progress=stop_at(50), **how) is None
    if earlier:
        (share,) = run(one, target, resume=True, **how)
    else:
        target.write_text("somebody's")
        with pytest.raises(fewbits.errors.ArgumentError, match="was created after the run began"):
            run(one, target, resume=True, **how)
        assert target.read_text() == "somebody's"
        (share,) = run(one, target, resume=True, replace=True, **how)
    assert share.resumed > 0


@pytest.mark.parametrize(
    "forged", [{"written": {"e": [float("inf"), ""]}}, {"tally": {}}, {"tally": {"unit": "no"}}], ids=str
)
def test_an_invalid_line_ends_a_journal(tmp_path, begun, forged):
    """The digest of the line is right, but its fields are invalid."""
    path = next(path for path in (staging_directory(tmp_path) / "journal").iterdir() if path.stat().st_size)
    first, *others = path.read_text().splitlines(keepends=True)
    fields = json.loads(first) | forged
    del fields["check"]
    text = json.dumps(fields, separators=(",", ":"))
    check = hashlib.sha256(text.encode()).hexdigest()[:16]
    path.write_text(f'{text[:-1]},"check":"{check}"}}\n' + "".join(others))
    run(begun, tmp_path / "out", resume=True)
    assert fewbits.verify(tmp_path / "out", begun).ok


def test_a_complete_result_of_tied_tensors_in_several_files_is_recognised(tmp_path):
    tied = torch.rand(64, 64)
    torch.save({"a.weight": tied, "b.weight": torch.rand(64, 64), "z.weight": tied}, tmp_path / "in.bin")
    output = fewbits.Output(tmp_path / "out", max_shard_size=5000, resume=True)
    for _ in range(2):
        quantize_small(tmp_path / "in.bin", "int8", output=output)
    assert len(fewbits.plan(tmp_path / "in.bin", "int8", min_elements=1, output=tmp_path / "x").shards) == 1
    assert fewbits.load(tmp_path / "out").keys() == {"a.weight", "b.weight", "z.weight"}


def test_a_complete_result_in_other_files_is_refused(tmp_path, source):
    run(source, tmp_path / "out")
    with pytest.raises(fewbits.errors.ArgumentError, match="it consists of other files"):
        run(source, tmp_path / "out", resume=True, max_shard_size=30_000)


def test_a_complete_file_that_was_damaged_is_written_again(tmp_path, begun):
    journals = {path.stem: path for path in (staging_directory(tmp_path) / "journal").iterdir()}
    file = next(name for name, path in journals.items() if '"header"' in path.read_text())
    path = staging_directory(tmp_path) / "files" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with cut(10):
        run(begun, tmp_path / "out", "int8", stop_at(1), resume=True)
    assert '"header"' not in journals[file].read_text()


def test_progress_of_a_resumed_run_ends_with_all_bytes(tmp_path, begun):
    steps = []
    run(begun, tmp_path / "out", "int8", steps.append, resume=True)
    done = [step.done for step in steps if step.activity == "convert"]
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == steps[0].total


@pytest.fixture
def work(monkeypatch):
    """Counts comparisons of each tensor with its source, and reads of each file."""
    counted = {"compared": 0, "read": 0}
    compare, read = Tally.add, FileBytes.read_into

    def counting_compare(self, original, stored):
        counted["compared"] += 1
        compare(self, original, stored)

    def counting_read(self, buffer, offset):
        counted["read"] += 1
        read(self, buffer, offset)

    monkeypatch.setattr(Tally, "add", counting_compare)
    monkeypatch.setattr(FileBytes, "read_into", counting_read)
    return counted


def test_each_tensor_is_compared_once_and_each_part_of_the_result_read_twice(tmp_path, work):
    source = write_shards(tmp_path / "model", {f"{index}.weight": torch.randn(8, 16) for index in range(5)}, 2)
    parts = 5 * 3  # codes, scales and shape of each tensor
    whole = fewbits.quantize(source, "int8", output=tmp_path / "out", min_elements=0)
    # The source is read once. The result is read before it is published, and again in validation.
    assert work == {"compared": 5, "read": 5 + 2 * parts}
    work.update(compared=0, read=0)
    resumed = fewbits.quantize(source, "int8", output=fewbits.Output(tmp_path / "out", resume=True), min_elements=0)
    # The result is read for its digests, for the comparison with the source, and for its digests in validation.
    assert work == {"compared": 5, "read": 5 + 3 * parts}
    assert resumed.report == whole.report
