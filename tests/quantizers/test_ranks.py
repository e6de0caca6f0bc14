"""Several ranks write one result: how files are spread, and runs under torchrun."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.conversion.ranks import spread
from support.checkpoints import write_shards
from support.lifecycle_helpers import files_in, visible

sizes = st.dictionaries(st.text(max_size=8), st.integers(0, 1000), max_size=30)

# How files are spread.


@given(sizes=sizes, count=st.integers(1, 9))
def test_every_file_goes_to_one_rank_in_the_order_of_the_result(sizes, count):
    shares = spread(sizes, count)
    order = {file: place for place, file in enumerate(sizes)}
    assert len(shares) == count
    assert sorted(file for share in shares for file in share) == sorted(sizes)
    for share in shares:
        assert share == sorted(share, key=order.__getitem__)


@given(sizes=sizes, count=st.integers(1, 9))
def test_the_loads_of_two_ranks_differ_by_at_most_the_smallest_file(sizes, count):
    """Each rank had the smallest load when it got its last file."""
    loads = [[sizes[file] for file in share] for share in spread(sizes, count)]
    least = min(map(sum, loads))
    for load in loads:
        assert not load or sum(load) - min(load) <= least


@given(sizes=sizes, count=st.integers(1, 9), data=st.data())
def test_the_spread_does_not_depend_on_the_order_of_files(sizes, count, data):
    shuffled = {file: sizes[file] for file in data.draw(st.permutations(list(sizes)))}
    assert [set(share) for share in spread(sizes, count)] == [set(share) for share in spread(shuffled, count)]


def test_a_missing_process_group_is_named(tmp_path):
    source = write_shards(tmp_path / "model", {"a.weight": torch.ones(32, 32)}, 1)
    with pytest.raises(fewbits.errors.ArgumentError, match="init_process_group"):
        fewbits.quantize(source, "int8", output=fewbits.Output(tmp_path / "out", distributed=True))


# Under torchrun. A start takes about ten seconds, so each test checks as much as it can.

SIZE = "5kB"


def tensors(rows=64):
    generator = torch.Generator().manual_seed(5)
    return {f"layers.{index}.weight": torch.randn(rows + index, 64, generator=generator) ** 3 for index in range(8)}


def torchrun(ranks, *arguments):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())


def quantize(source, *arguments):
    return ["-m", "fewbits", "quantize", source, "-o", source.parent / "out", "--scheme", "int8", *arguments]


@pytest.fixture
def source(tmp_path):
    return write_shards(tmp_path / "model", tensors(), 3)


def assert_is_that_of_one_process(source, scheme, **settings):
    """The files of the result; nothing else is left."""
    assert visible(source.parent) == ["model", "out"]
    assert len(os.listdir(source.parent)) == 2
    fewbits.quantize(source, scheme, output=fewbits.Output(source.parent / "one", max_shard_size=SIZE), **settings)
    assert files_in(source.parent / "out") == files_in(source.parent / "one")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_write_the_same_bytes_as_one_process(source, ranks):
    scheme = ["--scheme", "int4", "--group-size", 64]
    done = run(torchrun(ranks, *quantize(source, *scheme, "--max-shard-size", SIZE, "--json")))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["ranks"]
    assert [share["rank"] for share in told] == list(range(ranks))
    files = sorted(file for share in told for file in share["files"])
    assert files == sorted(path.name for path in (source.parent / "out").glob("*.safetensors"))
    assert all(share["files"] for share in told)
    assert sum(share["bytes"] for share in told) == sum(tensor.nbytes for tensor in tensors().values())
    assert json.loads(done.stdout)["report"]["ok"]
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {event.get("rank") for event in events} == {0}
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert len([message for message in warnings if "low_sqnr" in message]) == 1
    assert_is_that_of_one_process(source, "int4", group_size=64)


def last_file_of(source, rank):
    """The last tensor that a rank converts."""
    planned = fewbits.plan(source, "int8", output=fewbits.Output(source.parent / "out", max_shard_size=SIZE))
    load = {shard.file: sum(row.bytes_before for row in shard.ledger) for shard in planned.shards}
    file = spread(load, 2)[rank][-1]
    return next(row.name for shard in planned.shards if shard.file == file for row in shard.ledger)


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_job_and_says_why(tmp_path, source):
    name = last_file_of(source, rank=1)
    broken = tensors()
    broken[name][3, 5] = float("nan")
    write_shards(source, broken, 3)
    done = run(torchrun(2, *quantize(source, "--max-shard-size", SIZE)))
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"fewbits: rank 1: {name}, shape" in done.stderr
    assert "the element at index (3, 5) is nan" in done.stderr
    assert visible(tmp_path) == ["model"]


CATCHING = """
    import sys, time, torch.distributed as dist
    from pathlib import Path
    import fewbits

    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        output = fewbits.Output(folder / "out", max_shard_size=sys.argv[2], distributed=True)
        fewbits.quantize(folder / "model", "int8", output=output)
    except fewbits.FewbitsError as error:
        (folder / f"rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    end = time.monotonic() + 120
    while not all((folder / f"rank{each}.txt").exists() for each in range(2)):
        if time.monotonic() > end:
            sys.exit(f"rank {rank} is waiting")
        time.sleep(0.05)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_no_rank_waits_for_a_failed_rank_that_keeps_running(tmp_path, source):
    """As in a notebook, where an error does not end the process."""
    broken = tensors()
    broken[last_file_of(source, rank=1)][3, 5] = float("nan")
    write_shards(source, broken, 3)
    (tmp_path / "script.py").write_text(textwrap.dedent(CATCHING))
    done = run(torchrun(2, tmp_path / "script.py", tmp_path, SIZE))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank1.txt").read_text().startswith("NonFiniteError: ")
    assert (tmp_path / "rank0.txt").read_text().startswith("RankError: another rank has ended")


def ranks_of(parent):
    """The processes that torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(
                pair.split(b"=", 1) for pair in (path / "environ").read_bytes().split(b"\0") if b"=" in pair
            )
        except OSError:  # the process has ended
            continue
        if started_by == parent and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(path.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes as Linux shows them")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_continues_after_a_rank_was_killed(tmp_path, rank):
    source = write_shards(tmp_path / "model", tensors(20_000), 3)
    process = subprocess.Popen(
        torchrun(2, *quantize(source, "--max-shard-size", "3MB")),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any(path.stat().st_size for path in tmp_path.glob(".*.work/journal/*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.kill(ranks_of(process.pid)[rank], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SIGKILL" in told
    assert visible(tmp_path) == ["model"]
    done = run([sys.executable, *map(str, quantize(source, "--max-shard-size", "3MB", "--resume", "--json"))])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["converted"]["resumed_bytes"] > 0
    fewbits.quantize(source, "int8", output=fewbits.Output(tmp_path / "one", max_shard_size="3MB"))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "one")
