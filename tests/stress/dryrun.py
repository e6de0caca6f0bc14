"""Measure a dry run of a checkpoint of hundreds of gigabytes: its time, its memory, and the bytes that it reads.

The checkpoint is sparse (see `stress.synthetic`): its headers are real, and its tensors are holes, which no dry run
should read. Python itself reads modules, so the bytes read by a dry run of a small checkpoint are subtracted. For the
small checkpoint, the predicted bytes of each file are compared with the written bytes. Linux only.
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

#: The longest allowed time of the process, in seconds.
SECONDS = 10.0
#: Headers and index may be read so often; per file, Python may read two more buffers of 4096 bytes.
TIMES, BUFFERS = 2, 2 * 4096
#: Bytes and files of the small checkpoint, and the size of the files of its result.
SMALL, SMALL_SHARDS, SMALL_LIMIT = 8 * disk.MB, 3, "1MB"


def dry_run(source: Path, scheme: str, threads: int, *options: object) -> tuple[Measured, dict[str, Any]]:
    """Run one in its own process; return its measurements and its JSON.

    Raises:
        RuntimeError: if it fails.
    """
    found = measure("quantize", source, "--scheme", scheme, "--dry-run", "--json", *options, threads=threads)
    if found.code:
        raise RuntimeError(f"exit code {found.code}: {found.complaint}")
    return found, json.loads(found.output)


def described(source: Path) -> int:
    """Count the bytes of headers and index."""
    headers = sum(process.header_of(path)[0] for path in source.glob("*.safetensors"))
    return headers + sum(path.stat().st_size for path in source.glob("*.json"))


def checks(large: Measured, small: Measured, source: Path) -> list[str]:
    """Check time and bytes; return the promises as lines."""
    read = large.figures["read"] - small.figures["read"]
    most = TIMES * described(source) + BUFFERS * len(disk.files(source))
    figures = f"{large.figures['seconds']:.1f} s of them after imports, peak {large.figures['rise'] / disk.MB:.0f} MB"
    return [
        said(f"at most {SECONDS:g} s, found {large.wall:.1f} ({figures})", large.wall <= SECONDS),
        said(f"reads at most {most / disk.MB:.1f} MB, found {read / disk.MB:.2f} besides modules", read <= most),
    ]


def predicted(source: Path, scheme: str, threads: int, work: Path) -> str:
    """Check that a dry run predicts the tensor bytes of every file; return the promise as a line."""
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
    """Return the exit code: 1 if ``--check`` finds a broken promise."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("--size", type=disk.size, default=500 * 10**9, help="of all tensors; 500GB")
    made.add_argument("--shards", type=cli.positive, default=200, metavar="N", help="files; 200")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="directory for the checkpoint")
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
