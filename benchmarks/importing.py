"""What `import fewbits` costs after `import torch` and `import safetensors.torch`, as a share of what these cost.

Every round is a process of its own, and takes the cumulative times that Python's ``-X importtime`` reports.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import cli
from benchmarks.report import Cell, broken, said

CODE = "import torch, safetensors.torch; import fewbits"
#: What `import fewbits` may cost, as a share of what it needs anyway.
PROMISED = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if ``--check`` finds that it costs more than promised."""
    made = cli.parser(__doc__)
    made.add_argument("--check", action="store_true", help=f"fail beyond {PROMISED:.0%} of the others' time")
    arguments = made.parse_args(argv)
    report = cli.begin("importing", arguments)
    theirs, ours = zip(*(seconds() for _ in range(arguments.rounds)), strict=True)
    report.cells = [Cell({}, "torch and safetensors", theirs, theirs), Cell({}, "fewbits", ours, theirs)]
    share = 1 / report.cells[1].speed
    line = said(f"fewbits takes at most {PROMISED:.0%} of what torch and safetensors take", share <= PROMISED)
    table = "\n".join(f"{cell.contender:<22} {cell.median:.3f} s" for cell in report.cells)
    cli.finish(report, f"{table}\nshare {share:.1%}\n{line}", arguments)
    return int(arguments.check and broken([line]))


def seconds() -> tuple[float, float]:
    """Of torch and safetensors together, and of fewbits after them, in a new process."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", CODE], capture_output=True, text=True, check=True)
    fields = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    # One space before a name says that the import was asked for by the program itself.
    cumulative = {name: int(time) / 1e6 for _, time, name in fields if time.strip().isdigit()}
    return cumulative[" torch"] + cumulative[" safetensors.torch"], cumulative[" fewbits"]


if __name__ == "__main__":
    sys.exit(main())
