"""Quantize a checkpoint in several processes of torchrun, and compare the result with that of one process.

The program makes a checkpoint of equal files with equally many layers, and quantizes it into equally many files. With
1, 2 and 4 ranks the files must have the bytes of one process, and the ranks must have similar work. Then SIGKILL ends
one rank in the middle: torchrun must exit with a code other than 0 and a message, and one process that resumes with
``--resume`` must give the same files. Linux only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, disk
from benchmarks.report import Report, aligned, said

import fewbits
from stress import process, synthetic
from stress.killing import remove, resumed
from stress.unfinished import Job

#: The largest allowed ratio of the work of two ranks.
UNEVEN = 1.5
#: A rank is killed when this share of the source is done.
MIDDLE = 0.4
#: A run that takes more seconds hangs.
PATIENCE = 3600.0
#: Between two looks at the journals, in seconds.
LOOK = 0.01


def torchrun(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command that runs fewbits on so many ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, "-m", "fewbits", *arguments]


def even(ranks: int, job: Job, output: Path, expected: dict[str, str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Run on so many ranks; return the promises as lines, and the work of each rank."""
    start = time.perf_counter()
    ran = process.run(torchrun(ranks, job.arguments(output)), 1, PATIENCE)
    seconds = time.perf_counter() - start
    if ran.returncode:
        return [said(f"{ranks} ranks: exit code 0, found {ran.returncode}: {process.last_line(ran.stderr)}", False)], []
    same = disk.digests(output) == expected
    remove(output)
    told = json.loads(ran.stdout)["ranks"]
    sizes = [rank["bytes"] for rank in told]
    uneven = max(sizes) / max(1, min(sizes))
    held = len(sizes) == ranks and uneven <= UNEVEN
    return [
        said(f"{ranks} ranks: the files of one process, in {seconds:.1f} s", same),
        said(f"{ranks} ranks: the largest share at most {UNEVEN:g} times the smallest, found {uneven:.2f}", held),
    ], told


def killed(ranks: int, job: Job, output: Path) -> tuple[int, str]:
    """Kill the last rank in the middle; return the exit code and the messages of torchrun.

    Raises:
        RuntimeError: if the run ended too early, or no rank was found.
    """
    with tempfile.TemporaryFile("w+") as told:
        child = subprocess.Popen(
            torchrun(ranks, job.arguments(output)), env=process.environment(1), stdout=subprocess.DEVNULL, stderr=told
        )
        while job.recorded(output) < MIDDLE * job.total:
            if child.poll() is not None:
                told.seek(0)
                raise RuntimeError(f"it ended with {child.returncode} before a rank was killed: {told.read()[-300:]}")
            time.sleep(LOOK)
        victims = sorted(workers(child.pid))
        if not victims:
            raise RuntimeError("no rank was found")
        os.kill(victims[-1], signal.SIGKILL)
        code = child.wait(PATIENCE)
        told.seek(0)
        return code, told.read()


def workers(parent: int) -> Iterator[int]:
    """Yield the child processes that run fewbits."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # The name is in brackets and may hold any character; state and parent follow it.
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            arguments = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:  # the process has ended
            continue
        if started_by == parent and b"fewbits" in arguments:
            yield int(path.name)


def interrupted(ranks: int, job: Job, output: Path, expected: dict[str, str]) -> list[str]:
    """Kill a rank and resume with one process; return the promises as lines."""
    try:
        code, message = killed(ranks, job, output)
    except RuntimeError as error:
        return [said(f"a rank of {ranks} killed: {error}", False)]
    reason = next((line.strip() for line in message.splitlines() if "fewbits: " in line or "SIGKILL" in line), "")
    told_why = f"a rank of {ranks} killed: exit code not 0, found {code}, and a message, found: {reason}"
    lines = [said(told_why, code != 0 and bool(reason))]
    told, failed = resumed(job, output, 1, PATIENCE)
    same = output.exists() and disk.digests(output) == expected
    lines.append(said(f"one process resumed it to the same files, {told or failed}", same))
    remove(output)
    return lines


def table(told: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Show the work of each rank."""
    lines = [("ranks", "rank", "MB", "files")]
    for ranks in told:
        for each in ranks:
            size = f"{each['bytes'] / disk.MB:.1f}"
            lines.append((str(len(ranks)), str(each["rank"]), size, str(len(each["files"]))))
    return aligned(lines)


def prepared(work: Path, scheme: str, size: int, shards: int, seed: int) -> Job:
    """Write a checkpoint of equal files, to be quantized into equally many."""
    source = work / "source"
    synthetic.write(source, synthetic.equal_shape(size, shards), shards=shards, seed=seed)
    each = -(-fewbits.plan(source, scheme).ledger.bytes_after // shards)
    return Job.of(source, scheme, "--threads", 1, "--max-shard-size", each)


def measure(report: Report, job: Job, work: Path, counts: Sequence[int]) -> list[str]:
    """Run with every number of ranks, then with a killed rank; return all promises as lines."""
    output = work / "out"
    ran = process.run(process.command(*job.arguments(output)), 1)
    if ran.returncode:
        return [said(f"one process: exit code 0, found {ran.returncode}: {process.last_line(ran.stderr)}", False)]
    expected = disk.digests(output)
    remove(output)
    lines: list[str] = []
    report.extra["ranks"] = []
    for ranks in counts:
        found, told = even(ranks, job, output, expected)
        lines += found
        report.extra["ranks"].append(told)
    return lines + interrupted(max(2, *counts), job, output, expected)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if ``--check`` finds a broken promise."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("--size", type=disk.size, default=2 * 10**9, help="of the source; 2GB")
    made.add_argument("--shards", type=cli.positive, default=16, metavar="N", help="its files; 16")
    made.add_argument("--ranks", type=cli.listed(cli.positive), default=[1, 2, 4], metavar="N,...", help="1,2,4")
    made.add_argument("--scheme", default="int4", help="int4")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="directory for temporary files")
    arguments = made.parse_args(argv)
    disk.need_room(made, arguments.out, 3 * arguments.size)
    report = cli.begin("torchrun", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        work = Path(folder).absolute()
        job = prepared(work, arguments.scheme, arguments.size, arguments.shards, arguments.seed)
        lines = measure(report, job, work, arguments.ranks)
    return cli.finish(report, table(report.extra.get("ranks", [])), arguments, lines)


if __name__ == "__main__":
    sys.exit(main())
