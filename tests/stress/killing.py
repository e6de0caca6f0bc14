"""Kill a conversion at many moments, and resume it.

The command line runs once undisturbed. Then it runs again and again: SIGKILL ends it at moments spread over 5 to 95
percent of the undisturbed time, and a second process resumes it with ``--resume``. Each time the files must have the
bytes of the undisturbed run. The second process may convert only bytes of the source that the journals lacked when the
first died, and one more chunk per thread. A run that had published its result before the signal counts as finished.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from benchmarks import cli, disk
from benchmarks.report import aligned, said

from stress import process
from stress.unfinished import Job

FIRST, LAST = 0.05, 0.95
#: A run that takes so many times as long as the undisturbed run hangs.
PATIENCE = 20


@attrs.frozen
class Killed:
    """The outcome of one run that was killed and resumed.

    Attributes:
        after: seconds from its start to the signal.
        finished: whether its result was published before the signal.
        recorded: bytes of the source that the journals recorded as done.
        converted: bytes that the second process converted.
        resumed: bytes that it took over from the first.
        same: whether the files are those of the undisturbed run.
        reason: the error of the second process; empty if it succeeded.
    """

    after: float
    finished: bool
    recorded: int
    converted: int
    resumed: int
    same: bool
    reason: str


def moments(count: int, seconds: float) -> list[float]:
    """Spread the moments evenly from `FIRST` to `LAST`."""
    step = (LAST - FIRST) / max(1, count - 1)
    return [seconds * (FIRST + index * step) for index in range(count)]


def undisturbed(job: Job, output: Path, threads: int) -> float:
    """Measure the seconds of a run.

    Raises:
        RuntimeError: if it fails.
    """
    start = time.perf_counter()
    ran = process.run(process.command(*job.arguments(output)), threads)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}: {process.last_line(ran.stderr)}")
    return time.perf_counter() - start


def killed(job: Job, output: Path, threads: int, after: float) -> None:
    """Start the command line, and kill it after so many seconds if it still runs."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(process.command(*job.arguments(output)), env=process.environment(threads), **quiet)
    try:
        child.wait(after)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def resumed(job: Job, output: Path, threads: int, patience: float) -> tuple[dict[str, Any], str]:
    """Resume a killed run; return the byte counts in its JSON, and the error if it failed."""
    try:
        ran = process.run(process.command(*job.arguments(output, "--resume")), threads, patience)
    except subprocess.TimeoutExpired:
        return {}, f"not finished after {patience:.0f} s"
    if ran.returncode:
        return {}, f"exit code {ran.returncode}: {process.last_line(ran.stderr)}"
    return json.loads(ran.stdout)["converted"], ""


def once(job: Job, output: Path, threads: int, after: float, expected: dict[str, str], patience: float) -> Killed:
    """Kill and resume a run, record the outcome, and remove all files."""
    killed(job, output, threads, after)
    finished = output.exists()
    recorded = job.total if finished else job.recorded(output)
    told, reason = resumed(job, output, threads, patience)
    same = output.exists() and disk.digests(output) == expected
    remove(output)
    return Killed(after, finished, recorded, told.get("bytes", 0), told.get("resumed_bytes", 0), same, reason)


def remove(output: Path) -> None:
    """Remove a result, and the staging directories beside it."""
    for path in (output, *output.parent.glob(".fewbits-*")):
        shutil.rmtree(path, ignore_errors=True)


def trouble(job: Job, threads: int, found: Sequence[Killed]) -> Iterator[str]:
    """Yield a line for every broken promise."""
    for each in found:
        most = job.total - each.recorded + threads * job.chunk
        if each.reason:
            yield f"killed after {each.after:.2f} s: {each.reason}"
        elif not each.same:
            yield f"killed after {each.after:.2f} s: other bytes than the undisturbed run"
        elif each.converted > most:
            yield f"killed after {each.after:.2f} s: {each.converted:,} bytes converted again, more than {most:,}"
        elif not each.finished and each.converted + each.resumed != job.total:
            parts = f"{each.converted:,} bytes converted and {each.resumed:,} taken over"
            yield f"killed after {each.after:.2f} s: {parts} are not the {job.total:,} of the source"


def table(job: Job, found: Sequence[Killed]) -> str:
    """Show the recorded, the converted and the resumed bytes in percent of the source, over all runs."""
    lines = [("", "least", "median", "most")]
    for name, key in (("recorded", "recorded"), ("converted again", "converted"), ("taken over", "resumed")):
        shares = [100 * getattr(each, key) / max(1, job.total) for each in found if not each.finished] or [100.0]
        figures = min(shares), statistics.median(shares), max(shares)
        lines.append((f"{name}, %", *(f"{share:.1f}" for share in figures)))
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if ``--check`` finds a broken promise."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("source", type=Path, metavar="DIR", help="a checkpoint, such as stress.synthetic writes")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="directory for temporary results")
    made.add_argument("--scheme", default="int4", help="int4")
    made.add_argument("--moments", type=cli.positive, default=50, metavar="N", help="number of kills; 50")
    made.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of the result's files; 5GB")
    arguments = made.parse_args(argv)
    source, threads = arguments.source.absolute(), arguments.threads
    disk.need_room(made, arguments.out, 2 * disk.folder_size(source))
    report = cli.begin("killing", arguments)
    options = "--threads", threads, "--max-shard-size", arguments.max_shard_size
    job = Job.of(source, arguments.scheme, *options)
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        output = Path(work).absolute() / "out"
        seconds = undisturbed(job, output, threads)
        expected = disk.digests(output)
        remove(output)
        patience = PATIENCE * seconds + 60
        found = [once(job, output, threads, after, expected, patience) for after in moments(arguments.moments, seconds)]
    wrong = list(trouble(job, threads, found))
    finished = sum(each.finished for each in found)
    lines = [said(f"{len(found)} runs of {seconds:.1f} s killed and resumed, {finished} had finished", not wrong)]
    report.extra |= {"seconds": seconds, "runs": [attrs.asdict(each) for each in found]}
    return cli.finish(report, table(job, found), arguments, [*lines, *wrong])


if __name__ == "__main__":
    sys.exit(main())
