"""The stress programs, on checkpoints so small that they end at once.

Tests that start many processes are marked slow.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import copying, disk
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

import fewbits
from fewbits.sources.file import FileSource
from stress import dryrun, killing, limited, measured, process, synthetic, torchrun
from stress.killing import Killed
from stress.unfinished import Job

LINUX = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="figures are read from Linux's /proc")
MB = 10**6

pytestmark = pytest.mark.usefixtures("threads_as_before")


# Synthetic checkpoints.


@given(st.integers(2 * MB, 10**12), st.integers(4, 20))
def test_a_synthetic_checkpoint_has_the_requested_size_and_largest_tensor(size, parts):
    shape = synthetic.shape_of(size, size // parts)
    sizes = {name: synthetic.nbytes(each) for name, each in shape.tensors()}
    row = shape.hidden * synthetic.ITEM
    assert size // parts <= sizes["lm_head.weight"] < size // parts + row
    assert size - row < sum(sizes.values()) - row <= size + row
    assert shape.layers >= synthetic.LAYERS - 1


@given(st.integers(32 * MB, 10**11), st.integers(1, 16))
@example(443_994_112, 16)
def test_files_have_about_equal_or_exactly_equal_sizes(size, shards):
    equal = synthetic.cut(synthetic.equal_shape(size, shards), shards)
    assert len({sum(map(synthetic.nbytes, part.values())) for part in equal}) == 1
    shape = synthetic.shape_of(size, size // 64)
    parts = synthetic.cut(shape, shards)
    assert all(synthetic.cut(synthetic.shape_of(size, shards=shards), shards))
    largest = max(synthetic.nbytes(each) for _, each in shape.tensors())
    for part in parts:
        assert abs(sum(map(synthetic.nbytes, part.values())) - size / shards) <= largest + shape.hidden * synthetic.ITEM


def test_the_same_seed_gives_the_same_bytes_for_any_cut(tmp_path, synthetic_source):
    shape = synthetic.shape_of(2 * MB)
    for name, shards, seed in [("again", 3, 0), ("whole", 1, 0), ("other", 3, 1)]:
        synthetic.write(tmp_path / name, shape, shards=shards, seed=seed)
    assert disk.digests(tmp_path / "again") == disk.digests(synthetic_source)
    tensors = {n: t for path in synthetic_source.glob("*.safetensors") for n, t in load_file(path).items()}
    whole = load_file(tmp_path / "whole" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(whole[name], tensors[name]) for name in tensors)
    assert whole.keys() == tensors.keys()
    assert disk.digests(tmp_path / "other").keys() == disk.digests(synthetic_source).keys()
    made, other = disk.digests(synthetic_source), disk.digests(tmp_path / "other")
    assert [name for name in made if made[name] == other[name]] == ["config.json", "model.safetensors.index.json"]


def test_a_sparse_twin_has_the_headers_of_the_other_and_takes_no_room(tmp_path, synthetic_source):
    synthetic.write(tmp_path / "sparse", synthetic.shape_of(2 * MB), shards=3, sparse=True)
    assert [i.shape for i in FileSource(tmp_path / "sparse").infos] == [
        i.shape for i in FileSource(synthetic_source).infos
    ]
    for path in disk.files(synthetic_source):
        twin = tmp_path / "sparse" / path.name
        assert twin.stat().st_size == path.stat().st_size
        if path.suffix == ".safetensors":
            length, _ = process.header_of(path)
            assert twin.read_bytes()[:length] == path.read_bytes()[:length]
            assert not any(twin.read_bytes()[length:])


def test_synthetic_writes_the_requested_checkpoint(tmp_path, capsys):
    target = tmp_path / "made"
    asked = [str(target), "--size", "2MB", "--shards", "2", "--largest", "300kB"]
    assert synthetic.main([*asked, "--sparse"]) == 0
    assert re.search(r"2,\d{3},\d{3} bytes in 2 files", capsys.readouterr().out)
    sizes = {info.name: info.nbytes for info in FileSource(target).infos}
    assert 300_000 <= sizes["lm_head.weight"] < 301_000
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] > 1
    for bad in (
        asked,
        [str(tmp_path / "new"), "--size", "1kB"],
        [str(tmp_path / "new"), "--size", "2MB", "--largest", "1MB", "--shards", "99"],
    ):
        with pytest.raises(SystemExit) as refused:
            synthetic.main(bad)
        assert refused.value.code == 2
    assert not (tmp_path / "new").exists()


# Room.


def test_a_program_refuses_to_start_without_enough_space(tmp_path, synthetic_source, monkeypatch, capsys):
    monkeypatch.setattr(disk, "room", lambda path: 1000)
    for main, arguments in [
        (copying.main, [str(synthetic_source)]),
        (limited.main, [str(synthetic_source)]),
        (killing.main, [str(synthetic_source)]),
        (dryrun.main, []),
        (torchrun.main, []),
    ]:
        with pytest.raises(SystemExit) as refused:
            main([*arguments, "--out", str(tmp_path)])
        assert refused.value.code == 2
        assert "are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@LINUX
def test_the_space_of_a_file_system_in_memory_is_limited_by_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "available", lambda: 5)
    monkeypatch.setattr(disk, "SHM", tmp_path)
    assert disk.room(tmp_path) == 5
    monkeypatch.setattr(disk, "SHM", tmp_path / "missing")
    assert disk.room(tmp_path) > 5


def test_the_bytes_of_tensors_are_those_of_the_ledger(tmp_path, synthetic_source):
    ledger = fewbits.quantize(synthetic_source, "int4", output=tmp_path / "out", on_failure="ignore").ledger
    assert sum(process.tensor_bytes(path) for path in (tmp_path / "out").glob("*.safetensors")) == ledger.bytes_after


# Limited.


@LINUX
@pytest.mark.slow
def test_limited_holds_a_process_to_its_limit_and_compares_a_twin_with_memory(tmp_path, synthetic_source, capsys):
    asked = [str(synthetic_source), "--out", str(tmp_path), "--threads", "1", "--check"]
    assert limited.main([*asked, "--twin", str(synthetic_source)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("held: ") == 2
    assert re.search(r"held: at most 512 MB, found \d+\.\d, in \d+\.\d s, exit code 0", printed)
    assert re.search(r"held: [2-9] files of the twin as in memory, different: none", printed)
    assert list(tmp_path.iterdir()) == []


def test_limited_reports_an_exceeded_limit_and_a_dead_process():
    held, passed = ({"rise": rise, "seconds": 1.0} for rise in (5 * MB, 6 * MB))
    lines = [limited.checked(measured.Measured(0, "", "", 1.0, figures), 5 * MB)[0] for figures in (held, passed)]
    lines += limited.checked(measured.Measured(-9, "", "nothing was said", 1.0, {}), 5 * MB)
    assert [line.split(":")[0] for line in lines] == ["held", "NOT HELD", "NOT HELD"]
    assert "found -9" in lines[2]


@LINUX
def test_limited_reports_a_file_that_differs_from_that_of_memory(tmp_path, synthetic_source):
    made = tmp_path / "out"
    fewbits.quantize(synthetic_source, "int8", output=made, on_failure="ignore")

    def line() -> str:
        shutil.rmtree(tmp_path / "in-memory", ignore_errors=True)
        return limited.same_as_in_memory(synthetic_source, made, "int8", 5 * 10**9).split(":")[0]

    assert line() == "held"
    (file,) = made.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert line() == "NOT HELD"


# Dry runs.


def test_dryrun_subtracts_the_bytes_of_modules(synthetic_source):
    figures = {"read": 10 * MB, "seconds": 1.0, "rise": 1}
    small = measured.Measured(0, "", "", 2.0, figures)
    described = dryrun.described(synthetic_source)
    assert described < 20_000
    for read, wall, held in [(10 * MB + described, 9.0, [True, True]), (12 * MB, 11.0, [False, False])]:
        large = measured.Measured(0, "", "", wall, figures | {"read": read})
        assert [line.startswith("held") for line in dryrun.checks(large, small, synthetic_source)] == held


@LINUX
@pytest.mark.slow
def test_dryrun_reads_headers_only_and_predicts_the_written_bytes(tmp_path, capsys):
    assert dryrun.main(["--size", "5GB", "--shards", "20", "--out", str(tmp_path), "--threads", "1"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert re.match(r"held: reads at most .* besides modules", lines[0])
    assert re.match(r"held: ([\d,]+) bytes of tensors predicted in 3 files, written \1 in 3", lines[1])
    assert list(tmp_path.iterdir()) == []


# Killing.


def journal(folder, file, *lines):
    path = folder / ".fewbits-1.work" / "journal" / f"{file}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


def test_journals_are_counted_in_bytes_of_the_source(tmp_path, synthetic_source):
    job = Job.of(synthetic_source, "int4", "--threads", 1)
    name, other = sorted(job.item)[:2]
    assert job.total == sum(info.nbytes for info in FileSource(synthetic_source).infos)
    assert job.recorded(tmp_path / "out") == 0
    line = b'{"tensor":"%s","stop":%d}\n'
    first, second = ([line % (n.encode(), stop) for stop in stops] for n, stops in [(name, (8, 24)), (other, (16,))])
    journal(tmp_path, "a", b'{"run": 1}\n', *first, (line % (name.encode(), 99))[:-9])
    journal(tmp_path, "b", *second, b'{"header": "end"}\n')
    assert job.recorded(tmp_path / "out") == 2 * (24 + 16)
    killing.remove(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killing_reports_every_broken_promise(synthetic_source):
    job = Job.of(synthetic_source, "int4")
    done = job.total // 2
    left = job.total - done

    def run(finished=False, recorded=done, converted=left, resumed=done, same=True, reason=""):
        return Killed(1.0, finished, recorded, converted, resumed, same, reason)

    good = [run(), run(recorded=done + job.chunk), run(finished=True, recorded=job.total, converted=0, resumed=0)]
    assert list(killing.trouble(job, 1, good)) == []
    bad = {
        "exit code 2": run(reason="exit code 2: why"),
        "other bytes": run(same=False),
        "converted again": run(recorded=done + job.chunk + 1),
        "taken over": run(resumed=0),
    }
    for said, each in bad.items():
        (line,) = killing.trouble(job, 1, [*good, each])
        assert said in line
    assert "50.0" in killing.table(job, good)
    assert killing.table(job, good[2:])


def test_moments_are_spread_over_the_run():
    found = killing.moments(50, 100.0)
    assert (found[0], pytest.approx(found[-1])) == (5.0, 95.0)
    assert len(found) == 50
    assert killing.moments(1, 100.0) == [5.0]


@LINUX
@pytest.mark.slow
def test_a_killed_conversion_is_resumed(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    synthetic.write(source, synthetic.shape_of(100 * MB), shards=2)
    out.mkdir()
    asked = [str(source), "--out", str(out), "--moments", "4", "--max-shard-size", "10MB", "--threads", "2", "--check"]
    assert killing.main(asked) == 0, capsys.readouterr().out
    assert re.search(r"held: 4 runs of [\d.]+ s killed and resumed", capsys.readouterr().out)
    assert list(out.iterdir()) == []


# Several ranks.


@LINUX
def test_ranks_are_found_by_their_parent():
    code, lasting = "import sys; sys.stdin.read()", {"stdin": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", code, "fewbits"], **lasting) as rank,
        subprocess.Popen([sys.executable, "-c", code, "other"], **lasting),
    ):
        assert [*torchrun.workers(os.getpid())] == [rank.pid]
    assert [*torchrun.workers(os.getpid())] == []


def test_equal_files_become_equal_files(tmp_path):
    job = torchrun.prepared(tmp_path, "int4", 40 * MB, 16, 0)
    size = int(job.options[job.options.index("--max-shard-size") + 1])
    shards = fewbits.plan(job.source, "int4", output=fewbits.Output(tmp_path / "out", max_shard_size=size)).shards
    assert len(shards) == 16
    assert len({shard.ledger.bytes_after for shard in shards}) == 1


@LINUX
@pytest.mark.slow
def test_ranks_write_the_files_of_one_process_and_a_dead_rank_is_noticed(tmp_path, capsys):
    asked = ["--size", "200MB", "--shards", "8", "--ranks", "1,2", "--out", str(tmp_path), "--check"]
    assert torchrun.main(asked) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count("held: ") == 6
    assert list(tmp_path.iterdir()) == []
