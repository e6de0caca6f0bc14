"""Compare the time of `import fewbits` with the time of `import torch` and `import safetensors.torch`.

Every round starts a new process and reads the cumulative times of Python's ``-X importtime``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import cli
from benchmarks.report import Cell, said

CODE = "import torch, safetensors.torch; import fewbits"
#: The largest share of the time of torch and safetensors that `import fewbits` may add.
PROMISED = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(__doc__)
    arguments = made.parse_args(argv)
    report = cli.begin("importing", arguments)
    theirs, ours = zip(*(seconds() for _ in range(arguments.rounds)), strict=True)
    report.cells = [Cell({}, "torch and safetensors", theirs, theirs), Cell({}, "fewbits", ours, theirs)]
    share = 1 / report.cells[1].speed
    line = said(f"fewbits takes at most {PROMISED:.0%} of the time of torch and safetensors", share <= PROMISED)
    table = "\n".join(f"{cell.contender:<22} {cell.median:.3f} s" for cell in report.cells)
    return cli.finish(report, f"{table}\nshare {share:.1%}", arguments, [line])


def seconds() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", CODE], capture_output=True, text=True, check=True)
    fields = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    # One space before a name says that the import was asked for by the program itself.
    cumulative = {name: int(time) / 1e6 for _, time, name in fields if time.strip().isdigit()}
    return cumulative[" torch"] + cumulative[" safetensors.torch"], cumulative[" fewbits"]


if __name__ == "__main__":
    sys.exit(main())
