"""Start the fuzzer: ``python tests/fuzz/fuzz.py [seconds]``, in an environment with atheris; `make fuzz` makes one.

New inputs go to ``build/fuzz/corpus``, and inputs that fail to ``build/fuzz/findings``. `keep.py` then copies useful
new inputs to the corpus that the tests replay.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"

#: Maximum bytes of an input. Seeds have up to eight thousand; no tested code depends on the size.
LIMIT = 1 << 15


def main() -> None:
    import atheris

    sys.path.insert(0, str(HERE.parent))
    # Instrument fewbits only: torch takes minutes to instrument, and its branches would dominate the coverage.
    with atheris.instrument_imports(include=["fewbits"]):
        import fewbits

        for module in pkgutil.walk_packages(fewbits.__path__, "fewbits."):
            if "testing" not in module.name and "__main__" not in module.name and "cli" not in module.name:
                __import__(module.name)
    from case import parse
    from hostile import hostile
    from mutate import crossed, mutated
    from seeds import seeds
    from targets import limited, run

    logging.getLogger("fewbits").setLevel(logging.ERROR)
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None

    def test_one_input(data: bytes) -> int:
        case = parse(data)
        if case is None:
            return -1
        run(case, scratch)
        return 0

    def mutator(data: bytes, limit: int, seed: int) -> bytes:
        return mutated(data, seed, limit, lambda some, rng: atheris.Mutate(some, 2 * len(some) + 16))

    def crossover(data: bytes, other: bytes, limit: int, seed: int) -> bytes:
        return crossed(data, other, seed, limit)

    (BUILD / "corpus").mkdir(parents=True, exist_ok=True)
    (BUILD / "findings").mkdir(exist_ok=True)
    for name, case in (seeds() | hostile()).items():
        (BUILD / "corpus" / name).write_bytes(case.to_bytes())
        run(case, scratch)  # one-time work, such as imports, must not count against an input's limits
    atheris.Setup(arguments(sys.argv[1:]), test_one_input, custom_mutator=mutator, custom_crossover=crossover)
    with limited():
        atheris.Fuzz()


def arguments(given: list[str]) -> list[str]:
    """The command line for libFuzzer."""
    common = [sys.argv[0], f"-max_len={LIMIT}", "-timeout=20", "-rss_limit_mb=4096"]
    common += [f"-artifact_prefix={BUILD}/findings/"]
    seconds, *more = given or ["600"]
    folders = [str(BUILD / "corpus"), str(HERE / "corpus")]
    return [*common, f"-max_total_time={seconds}", "-print_final_stats=1", *more, *folders]


if __name__ == "__main__":
    main()
