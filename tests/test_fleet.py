"""`FleetRun`: other processes write the files, by hand and on a local Dask cluster."""

import itertools
import multiprocessing
import os
import pickle
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from support.checkpoints import write_shards
from support.lifecycle_helpers import FEWER_EXAMPLES, files_in, visible


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {f"layers.{index}.weight": torch.randn(40 + index, 64, generator=generator) for index in range(6)} | {
        "norm.weight": torch.ones(64)
    }


@pytest.fixture
def source(tmp_path):
    folder = write_shards(tmp_path / "model", tensors(), 3)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files that a single process writes."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_shards(folder / "model", tensors(), 3)
    (source / "config.json").write_text("{}")
    fewbits.quantize(source, "int8", output=fewbits.Output(folder / "out", max_shard_size="6kB"))
    return files_in(folder / "out")


def fleet(source, scheme="int8", **storage_spec):
    storage_spec.setdefault("max_shard_size", "6kB")
    settings = {name: storage_spec.pop(name) for name in ("validate", "exclude", "observer") if name in storage_spec}
    return fewbits.FleetRun(source, scheme, output=fewbits.Output(source.parent / "out", **storage_spec), **settings)


# The result.


def test_writing_files_one_by_one_gives_the_same_bytes_as_one_process(source, whole):
    run = fleet(source)
    files = run.begin()
    assert len(files) > 3
    shares = [run.write(file) for file in reversed(files)]
    result = run.finish(shares)
    assert files_in(source.parent / "out") == whole
    assert visible(source.parent) == ["model", "out"]
    assert result.report.ok
    assert result.model == source.parent / "out"
    assert result.quantizer.shares == tuple(shares)
    assert [share.files for share in shares] == [(file,) for file in reversed(files)]
    assert sum(share.converted for share in shares) == sum(tensor.nbytes for tensor in tensors().values())


@FEWER_EXAMPLES
@given(order=st.lists(st.integers(0, 20), max_size=12), driver=st.integers(0, 3))
def test_files_may_be_written_in_any_order_and_more_than_once_and_the_driver_may_change(
    tmp_path_factory, whole, order, driver
):
    folder = tmp_path_factory.mktemp("any")
    source = write_shards(folder / "model", tensors(), 3)
    (source / "config.json").write_text("{}")
    run = fleet(source)
    files = run.begin()
    for index, number in enumerate(order):
        if index == driver:
            run.release()
            run = fleet(source, resume=True)
            assert run.begin() == files
        pickle.loads(pickle.dumps(run)).write(files[number % len(files)])
    for file in files:
        run.write(file)
    assert run.finish().report.ok
    assert files_in(folder / "out") == whole


def test_the_result_may_be_a_single_file(source):
    one = next(source.glob("*.safetensors"))
    run = fewbits.FleetRun(one, "int8", output=source.parent / "one.safetensors", validate=False)
    (file,) = run.begin()
    run.write(file)
    result = run.finish()
    assert result.report is None
    assert result.model.is_file()
    assert fewbits.verify(result.model, one).ok


def test_a_complete_file_is_only_read_back(source):
    run = fleet(source)
    file = run.begin()[0]
    first, second = run.write(file), run.write(file)
    assert (second.converted, second.resumed) == (0, first.converted)


def test_an_existing_result_is_compared_with_its_source(source):
    def make(**storage_spec):
        run = fleet(source, **storage_spec)
        for file in run.begin():
            run.write(file)
        return run.finish()

    make()
    before = files_in(source.parent)
    run = fleet(source, resume=True)
    assert run.begin() == []
    result = run.finish()
    assert result.report.ok
    assert [share.converted for share in result.quantizer.shares] == [0]
    other = fleet(source, "int8-tensor", resume=True)
    assert other.begin() == []
    with pytest.raises(fewbits.errors.ArgumentError, match="differs from the result for"):
        other.finish()
    assert files_in(source.parent) == before


# Pickling.


class Rounded(fewbits.Int8PerChannel):
    """A custom scheme."""


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("scheme", ["int8", Rounded(observer=fewbits.MSEObserver())], ids=["name", "quantizer"])
def test_a_pickled_run_has_only_its_arguments(source, pickler, scheme):
    run = fleet(source, scheme)
    before = pickler.dumps(run)
    file = run.begin()[0]
    assert pickler.dumps(run) == before
    there = pickle.loads(before)
    there.write(file)
    with pytest.raises(fewbits.errors.StateError, match=r"call begin\(\) first"):
        there.finish()
    with pytest.raises(fewbits.errors.CheckpointError, match="another process is at work"):
        fleet(source, scheme, resume=True).begin()


def test_paths_mean_the_same_in_another_directory(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    run = fewbits.FleetRun("model", "int8", output=fewbits.Output("out", max_shard_size="6kB"))
    monkeypatch.chdir(source)
    for file in run.begin():
        run.write(file)
    assert run.finish().model == source.parent / "out"


# Refused calls.


def test_missing_files_are_named_and_can_still_be_written(source, whole):
    run = fleet(source)
    first, *others = run.begin()
    for file in others:
        run.write(file)
    before = files_in(source.parent)
    with pytest.raises(fewbits.errors.CheckpointError, match=f"not complete: {first};"):
        run.finish()
    assert files_in(source.parent) == before
    with pytest.raises(fewbits.errors.CheckpointError, match="another process is at work"):
        fleet(source, resume=True).begin()
    run.write(first)
    run.finish()
    assert files_in(source.parent / "out") == whole


def test_calls_out_of_order_are_refused(source):
    run = fleet(source)
    with pytest.raises(fewbits.errors.StateError, match=r"call begin\(\) first"):
        run.finish()
    with pytest.raises(fewbits.errors.CheckpointError, match="has not been begun"):
        run.write(shards(source.parent)[0].file)
    files = run.begin()
    with pytest.raises(fewbits.errors.StateError, match="has been called already"):
        run.begin()
    for file in files:
        run.write(file)
    run.finish()
    with pytest.raises(fewbits.errors.StateError, match=r"call begin\(\) first"):
        run.finish()
    with pytest.raises(fewbits.errors.CheckpointError, match="is complete"):
        run.write(files[0])


def test_a_file_that_is_not_part_of_the_result_is_refused(source):
    run = fleet(source)
    file = run.begin()[0]
    with pytest.raises(fewbits.errors.ArgumentError, match=rf"is not a file of .*did you mean '{file}'.*begin\(\)"):
        run.write(file.replace("model", "modl"))
    with pytest.raises(fewbits.errors.ArgumentError, match=r"is not a file of [^(]*; begin\(\) returns the names"):
        run.write(file.replace("00001", "00009", 1))


def test_an_unfinished_run_is_neither_removed_nor_resumed_unasked(source):
    run = fleet(source)
    file = run.begin()[0]
    run.write(file)
    run.release()
    with pytest.raises(fewbits.errors.ArgumentError, match=r"resume=True.*replace=True"):
        fleet(source).begin()
    again = fleet(source, replace=True)
    again.begin()
    assert again.write(file).resumed == 0


def test_resume_and_replace_work_together(source, whole):
    (source.parent / "out").mkdir()
    (source.parent / "out" / "old.txt").write_text("")
    run = fleet(source, replace=True)
    files = run.begin()
    run.write(files[0])
    run.release()
    again = fleet(source, resume=True, replace=True)
    shares = [again.write(file) for file in again.begin()]
    assert shares[0].resumed > 0
    assert (source.parent / "out" / "old.txt").exists()
    again.finish(shares)
    assert files_in(source.parent / "out") == whole


@pytest.mark.parametrize("change", ["source", "companion", "settings"])
def test_inputs_that_changed_since_begin_are_refused(source, change):
    run = fleet(source)
    file = run.begin()[0]
    if change == "settings":
        run = fleet(source, observer="mse")
    else:
        path = source / ("config.json" if change == "companion" else "model-00002-of-00003.safetensors")
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(fewbits.errors.ArgumentError, match="its inputs changed"):
        run.write(file)


def test_an_error_about_numbers_names_the_tensor(tmp_path):
    broken = tensors()
    broken["layers.2.weight"][3, 5] = float("nan")
    run = fleet(write_shards(tmp_path / "model", broken, 2))
    files = run.begin()
    (file,) = [shard.file for shard in shards(tmp_path) if "layers.2.weight" in [row.name for row in shard.ledger]]
    with pytest.raises(fewbits.errors.NonFiniteError, match=r"layers\.2\.weight") as caught:
        run.write(file)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(fewbits.errors.CheckpointError, match="not complete"):
        run.finish()
    assert set(files) == {shard.file for shard in shards(tmp_path)}


def shards(folder):
    output = fewbits.Output(folder / "out", max_shard_size="6kB")
    return fewbits.plan(folder / "model", "int8", output=output).shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": torch.nn.Linear(8, 8)}, "must be a path"),
        ({"output": fewbits.Output("out", distributed=True)}, "does not need it"),
        ({"scheme": None}, "give a scheme or a config"),
        ({"grup_size": 8}, "did you mean 'group_size'"),
    ],
)
def test_contradicting_arguments_are_refused_at_once(arguments, message):
    arguments = {"source": "model", "scheme": "int4", "output": "out", **arguments}
    with pytest.raises(fewbits.errors.ArgumentError, match=message):
        fewbits.FleetRun(arguments.pop("source"), arguments.pop("scheme"), **arguments)


# Other processes, and threads.


def test_threads_may_write_at_once(source, whole):
    run = fleet(source)
    with ThreadPoolExecutor(4) as pool:
        shares = list(pool.map(run.write, run.begin()))
    run.finish(shares)
    assert files_in(source.parent / "out") == whole


def test_only_one_process_at_a_time_writes_a_file(source, whole):
    """As after a scheduler took a running worker for lost."""
    run = fleet(source)
    files = run.begin()
    refused = []

    def write_too(step):
        with pytest.raises(
            fewbits.errors.CheckpointError, match=f"out/{files[0]}: another process is at work"
        ) as caught:
            run.write(files[0])
        refused.append(caught)

    run.write(files[0], progress=write_too)
    assert refused
    for file in files:
        run.write(file)
    run.finish()
    assert files_in(source.parent / "out") == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_do_not_block_a_resumed_run(source):
    run = fleet(source)
    run.begin()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)  # until the parent has closed its end
        os._exit(0)
    try:
        run.release()
        again = fleet(source, resume=True)
        again.begin()
        again.release()
    finally:
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


def _die(run, file):
    steps = itertools.count()

    def progress(step):
        if next(steps) > 2:
            os.kill(os.getpid(), signal.SIGKILL)

    run.write(file, progress=progress)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_another_worker_finishes_the_file_of_a_dead_worker(source, whole):
    run = fleet(source)
    files = run.begin()
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(run, files[0]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    shares = [run.write(file) for file in files]
    assert shares[0].resumed > 0
    run.finish(shares)
    assert files_in(source.parent / "out") == whole


def test_a_local_dask_cluster_writes_the_same_bytes_as_one_process(source, whole):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        run = fleet(source)
        shares = client.gather(client.map(run.write, run.begin()))
        result = run.finish(shares)
    assert result.report.ok
    assert len(shares) > 3
    assert files_in(source.parent / "out") == whole
