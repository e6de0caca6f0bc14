"""A dry run of a checkpoint of hundreds of gigabytes: how long it takes, what it reads, what memory it takes.

The checkpoint is sparse (see `stress.synthetic`): its headers are real, its tensors are holes that take no room,
and that nobody should read. What is read besides headers are mostly modules that Python imports: a dry run of a small
checkpoint, of a few megabytes, says how much that is, and is taken off. Of the small checkpoint the bytes that were
predicted for each file are compared with those that are written. Linux only.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, disk
from benchmarks.report import said

from stress import process, synthetic
from stress.measured import Measured, measure

#: Seconds from the start of the process to its end.
SECONDS = 10.0
#: How often headers and index may be read, and what a file may cost besides: Python reads buffers of 4096 bytes.
TIMES, BUFFERS = 2, 2 * 4096
#: The small checkpoint, and the files that its result is cut into.
SMALL, SMALL_SHARDS, SMALL_LIMIT = 8 * disk.MB, 3, "1MB"


def dry_run(source: Path, scheme: str, threads: int, *options: object) -> tuple[Measured, dict[str, Any]]:
    """One in a process of its own: what it took, and what it printed.

    Raises:
        RuntimeError: if it fails.
    """
    found = measure("quantize", source, "--scheme", scheme, "--dry-run", "--json", *options, threads=threads)
    if found.code:
        raise RuntimeError(f"exit code {found.code}: {found.complaint}")
    return found, json.loads(found.output)


def described(source: Path) -> int:
    """Bytes of a checkpoint that say where its tensors are."""
    headers = sum(process.header_of(path)[0] for path in source.glob("*.safetensors"))
    return headers + sum(path.stat().st_size for path in source.glob("*.json"))


def checks(large: Measured, small: Measured, source: Path) -> list[str]:
    """What it took, in words."""
    read = large.figures["read"] - small.figures["read"]
    most = TIMES * described(source) + BUFFERS * len(disk.files(source))
    figures = f"{large.figures['seconds']:.1f} s of them after imports, peak {large.figures['rise'] / disk.MB:.0f} MB"
    return [
        said(f"at most {SECONDS:g} s, found {large.wall:.1f} ({figures})", large.wall <= SECONDS),
        said(f"reads at most {most / disk.MB:.1f} MB, found {read / disk.MB:.2f} besides modules", read <= most),
    ]


def predicted(source: Path, scheme: str, threads: int, work: Path) -> str:
    """Whether a dry run of a checkpoint predicts the tensor bytes of every file; a line that says so."""
    options = ["--max-shard-size", SMALL_LIMIT]
    told = dry_run(source, scheme, threads, *options)[1]
    expected = {shard["file"]: shard["bytes"] for shard in told["shards"]}
    output = work / "out"
    ran = process.run(process.command("quantize", source, "-o", output, "--scheme", scheme, *options), threads)
    written = {path.name: process.tensor_bytes(path) for path in sorted(output.glob("*.safetensors"))}
    held = ran.returncode == 0 and written == expected
    return said(
        f"{sum(expected.values()):,} bytes of tensors predicted in {len(expected)} files, written "
        f"{sum(written.values()):,} in {len(written)}",
        held,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if ``--check`` finds a promise broken."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("--size", type=disk.size, default=500 * 10**9, help="of all tensors; 500GB")
    made.add_argument("--shards", type=cli.positive, default=200, metavar="N", help="files; 200")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="where the checkpoint is put")
    made.add_argument("--scheme", default="int4", help="int4")
    arguments = made.parse_args(argv)
    disk.need_room(made, arguments.out, 4 * SMALL)
    report = cli.begin("dryrun", arguments)
    scheme, threads = arguments.scheme, arguments.threads
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        large, small = Path(work).absolute() / "large", Path(work).absolute() / "small"
        shape = synthetic.shape_of(arguments.size, shards=arguments.shards)
        synthetic.write(large, shape, shards=arguments.shards, sparse=True)
        synthetic.write(small, synthetic.shape_of(SMALL, shards=SMALL_SHARDS), shards=SMALL_SHARDS, seed=arguments.seed)
        taken = dry_run(large, scheme, threads)[0]
        lines = checks(taken, dry_run(small, scheme, threads)[0], large)
        lines.append(predicted(small, scheme, threads, Path(work).absolute()))
        report.extra |= {"figures": {**taken.figures, "wall": taken.wall, "described": described(large)}}
    return cli.finish(report, "", arguments, lines)


if __name__ == "__main__":
    sys.exit(main())
