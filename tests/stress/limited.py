"""Quantize a checkpoint on disk under a memory limit that the system enforces.

The process runs the command line with ``--max-memory``. RLIMIT_DATA allows it the data of a process that imported
fewbits, plus the limit: one more allocation ends it. The rise of resident memory (VmHWM) is measured too. With
``--twin``, a smaller checkpoint is quantized in the same way, and its files are compared byte by byte with those of the
same tensors quantized as a state dict. Linux only.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cli, disk
from benchmarks.report import said
from safetensors.torch import load_file

import fewbits
from fewbits.checkpoint.output import MAX_SHARD_SIZE
from fewbits.quantizers.schemes import SCHEMES
from stress.measured import Measured, measure

#: The result of a twin is cut into about so many files.
TWIN_FILES = 8


def quantize(
    source: Path, output: Path, scheme: str, limit: int, threads: int, shard: int = MAX_SHARD_SIZE
) -> Measured:
    """Run the command line under the limit, into files of at most so many bytes."""
    options = ["--scheme", scheme, "--max-memory", limit, "--threads", threads, "--max-shard-size", shard]
    return measure("quantize", source, "-o", output, *options, threads=threads, limit=limit)


def checked(found: Measured, limit: int) -> list[str]:
    """Check the limit and the exit code; return the promise as a line."""
    if found.code or not found.figures:
        return [said(f"exit code 0, found {found.code}: {found.complaint}", False)]
    rise, seconds = found.figures["rise"], found.figures["seconds"]
    held = rise <= limit
    return [
        said(f"at most {limit / disk.MB:.0f} MB, found {rise / disk.MB:.1f}, in {seconds:.1f} s, exit code 0", held)
    ]


def same_as_in_memory(twin: Path, output: Path, scheme: str, shard: int) -> str:
    """Compare the files of a result with those of its tensors as a state dict; return the promise as a line.

    Names may differ, because those of a directory depend on the programs that can open it.
    """
    tensors = {name: tensor for path in twin.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = output.with_name("in-memory")
    fewbits.quantize(tensors, scheme, on_failure="ignore").save(expected, max_shard_size=shard)
    made, known = ([*map(disk.digest, sorted(folder.glob("*.safetensors")))] for folder in (output, expected))
    different = [number for number in range(max(len(made), len(known))) if made[number:][:1] != known[number:][:1]]
    return said(f"{len(known)} files of the twin as in memory, different: {different or 'none'}", not different)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if ``--check`` finds a broken promise."""
    made = cli.parser(__doc__, rounds=None)
    made.add_argument("source", type=Path, metavar="DIR", help="the checkpoint, such as stress.synthetic writes")
    made.add_argument("--out", type=Path, default=Path("/tmp"), metavar="DIR", help="directory for temporary results")
    made.add_argument("--scheme", choices=[*SCHEMES], default="int4", help="int4")
    made.add_argument("--max-memory", type=disk.size, default=512 * disk.MB, metavar="SIZE", help="512MB")
    made.add_argument("--twin", type=Path, metavar="DIR", help="a smaller checkpoint, to be compared with memory")
    arguments = made.parse_args(argv)
    limit, threads, scheme = arguments.max_memory, arguments.threads, arguments.scheme
    twin = None if arguments.twin is None else arguments.twin.absolute()
    disk.need_room(made, arguments.out, disk.folder_size(arguments.source))
    report = cli.begin("limited", arguments)
    logging.getLogger("fewbits").addHandler(logging.NullHandler())  # the quality of the codes does not matter here
    lines = []
    with tempfile.TemporaryDirectory(dir=arguments.out) as work:
        output = Path(work) / "out"
        found = quantize(arguments.source.absolute(), output, scheme, limit, threads)
        lines += checked(found, limit)
        report.extra["figures"] = found.figures
    if twin is not None:
        disk.need_room(made, arguments.out, 2 * disk.folder_size(twin))
        with tempfile.TemporaryDirectory(dir=arguments.out) as work:
            output = Path(work) / "out"
            shard = disk.folder_size(twin) // TWIN_FILES
            small = quantize(twin, output, scheme, limit, threads, shard)
            lines += checked(small, limit) if small.code else [same_as_in_memory(twin, output, scheme, shard)]
    return cli.finish(report, "", arguments, lines)


if __name__ == "__main__":
    sys.exit(main())
