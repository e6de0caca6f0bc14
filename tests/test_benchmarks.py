"""The harness of the benchmarks, on layers so small that their times mean nothing.

The tests marked slow check promises on any machine: those of memory.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import (
    contender,
    decoding,
    forwards,
    importing,
    layers,
    linear,
    machine,
    memory,
    model,
    networks,
    ours,
    peers,
    plot,
    presets,
    promises,
    quality,
    quantize,
    resident,
    scores,
    texts,
    timing,
    vision,
)
from benchmarks.contender import Contender
from benchmarks.report import Cell, Failure, Report, aligned, pivot
from torch import nn

import fewbits

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
QUICK = ["--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """A cache so small that two layers do not fit it."""
    monkeypatch.setattr(contender, "last_level_cache", lambda: 1024)


def broken(layer):
    raise RuntimeError("no kernel\nfor this CPU")


# Timing.


def test_interleave_gives_every_contender_a_number_a_round():
    timed = timing.interleave({"a": lambda: None, "b": lambda: None}, 3, turn=0, pause=0)
    assert {name: len(seconds) for name, seconds in timed.seconds.items()} == {"a": 3, "b": 3}
    assert timed.failures == {}


@pytest.mark.parametrize("good_calls", [0, 5, 8])
def test_interleave_leaves_out_a_contender_that_fails_at_any_time(good_calls):
    calls = iter(range(good_calls))

    def fails_later():
        if next(calls, None) is None:
            raise ValueError("worn out\nmore lines")

    timed = timing.interleave({"a": fails_later, "b": lambda: None}, 3, turn=0, pause=0)
    assert [*timed.seconds] == ["b"]
    assert len(timed.seconds["b"]) == 3
    assert timed.failures == {"a": "ValueError: worn out"}


def test_a_cycle_runs_all_layers_in_turn():
    seen = []
    cycle = timing.Cycle([lambda x, i=i: seen.append(i) for i in range(3)], torch.zeros(1))
    for _ in range(7):
        cycle()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_rotation_only_changes_the_neighbours():
    names = [*"abcdefg"]
    assert all(sorted(timing.rotated(names, r)) == names for r in range(10))
    assert timing.rotated(names, 1) != names
    assert timing.rotated([], 4) == []


# Contenders.


def test_layers_fill_the_cache_several_times_and_share_no_memory(monkeypatch):
    monkeypatch.setattr(contender, "last_level_cache", lambda: 1000)
    assert contender.copies(100, bits=32, multiple=4) == 10
    assert contender.copies(100, bits=4, multiple=4) == 80
    assert contender.copies(10**6, bits=32, multiple=4) == 2
    assert contender.copies(1, bits=1, multiple=4, most=7) == 7
    weight = torch.randn(8, 8)
    layers = contender.dense(torch.bfloat16).layers(weight, 3)
    assert len({layer.weight.data_ptr() for layer in layers} | {weight.data_ptr()}) == 4
    assert all(torch.equal(layer.weight, weight.bfloat16()) for layer in layers)


def test_a_slow_layer_is_built_once():
    built = []
    slow = Contender("slow", "torch", build=lambda layer: built.append(1) or layer, anew=False)
    first, second = slow.layers(torch.randn(4, 4), 2)
    assert built == [1]
    assert first.weight.data_ptr() != second.weight.data_ptr()


def test_the_machine_is_named():
    about = machine.machine()
    assert about["cpu"]
    assert about["threads"] == torch.get_num_threads()
    assert about["last_level_cache"] > 2**15
    assert machine.versions(["torch", "no-such-package"]).keys() == {"python", "torch"}
    assert [machine._bytes(size) for size in ("32K", "1M\n", "512")] == [32 * 2**10, 2**20, 512]


# Reports.


def test_a_ratio_is_taken_within_each_round():
    cell = Cell({"M": 1}, "ours", [1.0, 2.0, 4.0], [3.0, 4.0, 40.0])
    assert (cell.median, cell.spread, cell.speed) == (2.0, 1.5, 3.0)
    assert math.isnan(Cell({}, "alone", [1.0]).speed)
    assert Cell({}, "alone", [1.0]).to_dict()["speed"] is None


def test_a_table_has_a_dash_for_a_missing_measurement():
    cells = [Cell({"M": 1}, "a", [1.0]), Cell({"M": 2}, "a", [1.0]), Cell({"M": 2}, "b", [1.0])]
    rows = pivot(cells, "M", lambda cell: f"{cell.median:g}")
    assert rows == [("", "M 1", "M 2"), ("a", "1", "1"), ("b", "-", "1")]
    assert aligned(rows).splitlines()[-1] == "b    -    1"


def test_a_report_names_missing_packages_and_failures(tmp_path):
    about = {"cpu": "c", "capabilities": [], "architecture": "x", "threads": 1}
    report = Report("linear", {}, about, {"torch": "2"}, ["hqq"], failures=[Failure({"M": 1}, "b", "why")])
    assert "not installed: hqq" in report.heading()
    assert report.trouble() == "left out: b (M 1): why"
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["failures"][0]["reason"] == "why"


# Linear.


def run_linear(tmp_path, *arguments):
    file = tmp_path / "linear.json"
    assert linear.main([*QUICK, "--turn", "0", "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


@pytest.mark.usefixtures("tiny")
def test_linear_measures_every_contender_in_every_case(tmp_path, capsys):
    found = run_linear(tmp_path, "--shape", "64x128", "--rows", "1,3", "--dtype", "float32,bfloat16", "--no-peers")
    assert found["failures"] == []
    names = ["dense fp32", "dense bf16", "dense fp16"]
    names += [ours.label(scheme, dtype) for scheme in ours.USUAL for dtype in (torch.float32, torch.bfloat16)]
    assert [(c["M"], c["contender"]) for c in found["cells"]] == [(rows, name) for rows in (1, 3) for name in names]
    assert all(cell["case"] == "64x128 g128" and len(cell["seconds"]) == 1 for cell in found["cells"])
    dense_cell, *_, last = found["cells"]
    assert (dense_cell["speed"], dense_cell["sqnr_db"], last["dtype"]) == (1.0, None, "bfloat16")
    # Each kernel computes the product: a wrong product has about 0 dB.
    assert all(cell["sqnr_db"] is None or cell["sqnr_db"] > 12 for cell in found["cells"])
    assert found["machine"]["threads"] == found["settings"]["threads"] == 1
    assert "times faster than dense fp32" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_linear_names_the_kernel_of_every_cell_of_fewbits(tmp_path, capsys):
    found = run_linear(tmp_path, "--shape", "64x128", "--rows", "1,64", "--scheme", "int8,int4-exact", "--no-peers")
    kernels = {(c["contender"], c["M"]): c["kernel"] for c in found["cells"] if c["package"] == "fewbits"}
    assert kernels.keys() == {(f"fewbits {s}", m) for s in ("int8", "int4-exact") for m in (1, 64)}
    assert kernels["fewbits int4-exact", 1] == kernels["fewbits int4-exact", 64] == "reference"
    layer = fewbits.Int8PerChannel()
    layer.prepare(nn.Linear(128, 64))
    told = fewbits.explain(layer.convert(), torch.randn(64, 128)).rows[0].kernel
    assert kernels["fewbits int8", 64] == told
    assert "64x128 g128: kernel" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_every_scheme_with_codes_goes_through_a_kernel(tmp_path):
    found = run_linear(tmp_path, "--preset", "schemes", "--shape", "64x128", "--rows", "1,64")
    assert found["failures"] == []
    kernels = {(c["contender"], c["M"]): c["kernel"] for c in found["cells"] if c["package"] == "fewbits"}
    assert kernels.keys() == {(f"fewbits {name}", rows) for name in ours.ALL for rows in (1, 64)}
    assert "reference" not in kernels.values()


@pytest.mark.usefixtures("tiny")
def test_a_failing_peer_is_reported_and_the_others_continue(tmp_path, monkeypatch, capsys):
    def contenders(dtype, group_size):
        cannot_run = Contender("cannot run", "peer", dtype, build=lambda layer: lambda x: broken(layer))
        return [Contender("cannot build", "peer", dtype, build=broken), cannot_run, contender.dense(torch.float64)]

    present = SimpleNamespace(PACKAGE="peer", MODULES=("json",), contenders=contenders)
    absent = SimpleNamespace(PACKAGE="absent-peer", MODULES=("no_such_module",))
    monkeypatch.setattr(peers, "PEERS", (present, absent))
    monkeypatch.setattr(peers, "PACKAGES", ("peer", "absent-peer"))
    found = run_linear(tmp_path, "--shape", "16x64", "--rows", "1", "--scheme", "int8", "--peers")
    assert {(f["contender"], f["reason"]) for f in found["failures"]} == {
        ("cannot build", "RuntimeError: no kernel"),
        ("cannot run", "RuntimeError: no kernel"),
    }
    assert found["missing"] == ["absent-peer"]
    assert [cell["contender"] for cell in found["cells"]][-2:] == ["fewbits int8", "dense fp64"]
    assert "left out: cannot build (case 16x64 g128): RuntimeError: no kernel" in capsys.readouterr().out


def test_options_replace_settings_of_a_preset():
    given = {"rows": None, "dtype": None, "scheme": None, "peers": None, "shape": None, "group_size": None}
    shapes = presets.resolved(SimpleNamespace(preset="shapes", **given))
    assert shapes == presets.PRESETS["shapes"]
    other = presets.resolved(SimpleNamespace(preset="cliffs", **given | {"group_size": [32, 64], "peers": True}))
    assert [str(case) for case in other.cases] == ["4096x4096 g32", "4096x4096 g64"]
    assert other.peers
    assert other.rows == presets.PRESETS["cliffs"].rows


@pytest.mark.parametrize("arguments", [["--shape", "64"], ["--scheme", "int9"], ["--dtype", "int8"], ["--rows", "0"]])
def test_linear_refuses_unknown_values(arguments, capsys):
    with pytest.raises(SystemExit):
        linear.main(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(("vnni", "held"), [(True, False), (False, True)])
def test_promises_depend_on_the_processor(monkeypatch, vnni, held):
    monkeypatch.setattr(promises, "has_vnni", lambda: vnni)
    where = {"case": promises.USUAL, "M": 1}
    cells = [Cell(where, "dense fp32", [2.2, 2.2]), Cell(where, "fewbits int8", [1.0, 1.0])]
    (line,) = promises.checked(cells)
    assert line.startswith("held: fewbits int8") is held
    assert "2.20 times dense fp32" in line


def test_promises_against_peers_and_narrow_inputs(monkeypatch):
    monkeypatch.setattr(promises, "has_vnni", lambda: True)
    seconds = {
        "dense fp32": 5.0,
        "dense bf16": 0.5,
        "fewbits int4": 1.0,
        "fewbits int4, bf16": 1.2,
        "hqq 4 bit g64, fp32": 9.0,
        "quanto qint4, bf16": 1.1,
    }
    cells = [Cell({"case": promises.USUAL, "M": 1}, name, [value]) for name, value in seconds.items()]
    lines = promises.checked(cells)
    pattern = rf"(held|NOT HELD): (.*), {promises.USUAL}, M 1: (.*)"
    found = [re.fullmatch(pattern, line).groups() for line in lines]
    compared = [(own, *re.findall(r"times (.*?) \(", times), verdict == "held") for verdict, own, times in found]
    assert compared == [
        ("fewbits int4", "dense fp32", True),
        ("fewbits int4", "hqq 4 bit g64, fp32", False),
        ("fewbits int4, bf16", "quanto qint4, bf16", True),
        ("fewbits int4, bf16", "fewbits int4", "dense bf16", False),
    ]


@pytest.mark.parametrize(("seconds", "held"), [(2.0, True), (2.1, False)])
def test_schemes_with_levels_promise_half_the_speed_of_integers(seconds, held):
    times = {"fewbits int4": 1.0, "fewbits nf4": seconds}
    (line,) = promises.checked([Cell({"case": promises.USUAL, "M": 7}, name, [value]) for name, value in times.items()])
    assert line.startswith("held: fewbits nf4") is held
    assert "times fewbits int4 (at least 0.50)" in line


def test_unlisted_shapes_have_no_promises():
    def cells(case):
        return [Cell({"case": case, "M": 32}, name, [1.0]) for name in ("dense fp32", "fewbits int8")]

    assert promises.checked(cells("8x8 g128")) == []
    (line,) = promises.checked(cells("4095x4097 g128"))
    assert line.startswith("held: ")


def test_importing_prints_the_share_of_fewbits(capsys):
    assert importing.main(["--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fewbits +\d+\.\d+ s\nshare \d+\.\d%", printed)


# Quantize.


@pytest.mark.slow
def test_quantize_times_fewbits_and_a_copy(tmp_path, monkeypatch, capsys):
    fails = Contender("cannot quantize", "peer", start=broken)
    slow = Contender("slow", "peer", start=lambda layer: lambda: None)
    contenders = {"PACKAGE": "peer", "MODULES": ("json",), "contenders": lambda dtype, group_size: [fails, slow]}
    monkeypatch.setattr(peers, "PEERS", (SimpleNamespace(**contenders),))
    monkeypatch.setattr(peers, "PACKAGES", ("peer",))
    file = tmp_path / "quantize.json"
    assert quantize.main([*QUICK, "--shape", "32x128", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [c["contender"] for c in found["cells"]] == ["copy_", "fewbits int8", "fewbits int4", "slow"]
    assert all(len(cell["seconds"]) == 1 for cell in found["cells"])
    assert [failure["contender"] for failure in found["failures"]] == ["cannot quantize"]
    assert len(found["promises"]) == 2
    assert "in copies" in capsys.readouterr().out


def test_a_very_slow_contender_quantizes_once(monkeypatch):
    calls = []
    monkeypatch.setattr(quantize, "PATIENCE", -1.0)
    patient = Contender("patient", "peer", start=lambda layer: lambda: calls.append(1))
    report = Report("quantize", {}, {}, {})
    quantize.measure(report, [contender.copy_contender(), patient], torch.randn(4, 4), rounds=3)
    assert len(calls) == 2  # one of them a warm-up
    assert [len(cell.seconds) for cell in report.cells] == [1, 1]


# Model.


class Parrot(nn.Module):
    """A model whose `generate` counts up, with the arguments of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.lm_head(self.layer(x))

    def generate(self, ids, *, max_new_tokens, stopping_criteria, cache_implementation, **_):
        assert cache_implementation == "static"
        for _ in range(max_new_tokens):
            self(torch.zeros(1, 4))
            ids = torch.cat([ids, ids[:, -1:] + 1], 1)
            assert not any(bool(stop(ids, None).any()) for stop in stopping_criteria)
        return ids


def test_decoding_is_timed_from_the_first_token_to_the_last():
    decoded = decoding.generate(Parrot(), [5, 6], 4)
    assert list(decoded.tokens) == [7, 8, 9, 10]
    assert decoded.seconds > 0
    watch = decoding.Watch()
    watch.times = [1.0, 2.0, 5.0]
    assert watch.seconds == 2.0


def test_a_variant_does_not_change_the_model():
    parrot = nn.Sequential(nn.Linear(64, 64))
    held = model.Variant(torch.bfloat16, "int8").of(parrot)
    assert isinstance(held[0].weight, torch.Tensor)
    assert held[0].bias.dtype == torch.bfloat16
    assert type(parrot[0]) is nn.Linear
    assert parrot[0].weight.dtype == torch.float32


def test_models_take_turns_and_failures_are_left_out():
    def decode(tokens):
        return decoding.Decoded(0.5, [1, 2, 3, 4, 5, 6, 7, 8, 9][:tokens])

    decoders = {
        "dense fp32": decode,
        "other": lambda tokens: decoding.Decoded(0.25, [1, 2, 0][:tokens]),
        "broken": broken,
        "llama.cpp": lambda tokens: decoding.Decoded(0.1, text="words"),
    }
    report = Report("model", {}, {}, {})
    model.measure(report, decoders, 3, rounds=2)
    found = {cell.contender: (len(cell.seconds), cell.speed, cell.facts["agrees"]) for cell in report.cells}
    assert found == {"dense fp32": (2, 1.0, 3), "other": (2, 2.0, 2), "llama.cpp": (2, 5.0, None)}
    assert [failure.contender for failure in report.failures] == ["broken"]
    assert "tokens/s" in model.table(report)
    report.cells = [Cell({}, n, [s]) for n, s in {"dense bf16": 2.0, "fewbits int8": 1.0, "fewbits int4": 3.0}.items()]
    assert [line.split(":")[0] for line in model.checks(report)] == ["held", "NOT HELD"]


# Memory.


@LINUX
@pytest.mark.parametrize("kind", [*resident.KINDS])
def test_a_file_for_loading_has_the_requested_size(tmp_path, kind):
    resident.write(kind, 256, 100_000, tmp_path / "model.safetensors")
    layers, size = resident.loaded(tmp_path / "model.safetensors", 256)
    built, built_size = resident.converted(kind, 256, 100_000)
    assert len(layers) == len(built) > 1
    assert size >= 100_000
    # A state dict has the shape of each weight besides, which the ledger's bytes have too.
    assert size == built_size
    resident.run(layers, 256, (1, 3))


@LINUX
def test_memory_measures_in_its_own_process(tmp_path, capsys):
    file = tmp_path / "memory.json"
    sizes = ["--stored", "0.0001", "--side", "128", "--forwards", "5"]
    asked = ["--only", "resident", "--kind", "int8", "--way", "converted", "--json", str(file)]
    assert memory.main([*asked, *sizes, "--threads", "1"]) == 0
    (row,) = json.loads(file.read_text())["resident"]
    assert row["stored"] >= 100_000
    assert row["resident"] == row["anonymous"] + row["file"] + row["shared"]
    assert row["limit"] == int(1.10 * row["stored"]) + 10 * 10**6
    assert "held" in capsys.readouterr().out


def test_an_unmeasurable_case_and_an_exceeded_limit_are_failures(monkeypatch, capsys):
    row = {"kind": "int8", "way": "loaded", "layers": 1, "stored": 1, "anonymous": 9, "file": 0, "shared": 0}
    monkeypatch.setattr(memory, "resident_case", lambda *_: row | {"resident": 9, "free": 0, "limit": 8, "held": False})
    monkeypatch.setattr(memory, "peak_case", broken)
    assert memory.main(["--only", "resident", "--kind", "int8", "--way", "loaded"]) == 1
    assert "NOT HELD" in capsys.readouterr().out
    assert memory.main(["--only", "peak"]) == 1
    assert "left out: peak" in capsys.readouterr().out


@LINUX
@pytest.mark.slow
def test_converting_a_gibibyte_peaks_within_64_mb_of_source_and_result(capsys):
    assert memory.main(["--only", "peak"]) == 0
    printed = capsys.readouterr().out
    table = printed.partition("\n\n")[2]  # the heading names features of the CPU, such as amx_int8
    assert table.count("int4") == table.count("int8") == 2


@LINUX
@pytest.mark.slow
def test_a_gigabyte_of_codes_that_was_run_takes_little_more_than_a_gigabyte(capsys):
    assert memory.main(["--only", "resident"]) == 0
    assert capsys.readouterr().out.count("held") == len(resident.KINDS) * len(resident.WAYS)


# Quality.


def log_probabilities(seed, rows=7):
    return torch.log_softmax(torch.randn(rows, 11, generator=torch.Generator().manual_seed(seed)), -1)


def test_a_model_does_not_diverge_from_itself():
    parts = [log_probabilities(0), log_probabilities(1, 3)]
    assert scores.divergence(parts, parts) == 0
    assert scores.divergence([log_probabilities(2), log_probabilities(3, 3)], parts) > 0
    assert scores.divergence([torch.cat(parts)], [torch.cat(parts)]) == 0


def test_the_perplexity_of_even_guesses_is_the_number_of_classes():
    even = torch.full((5, 8), 1 / 8).log()
    assert scores.perplexity([even], [torch.tensor([1, 2, 3, 4, 5])]) == pytest.approx(8)


def test_embeddings_rank_like_themselves_and_not_like_others():
    x, other = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    assert scores.ranking(3 * x, x) == pytest.approx(1)
    assert scores.cosine(3 * x, x) == pytest.approx(1)
    assert abs(scores.ranking(other, x)) < 0.9


def test_texts_to_calibrate_and_to_evaluate_share_no_paragraph():
    calibration = {p for p in texts.docstrings().split("\n\n") if len(p) > 200}
    evaluation = {p for p in texts.topics().split("\n\n") if len(p) > 200}
    assert calibration
    assert evaluation
    assert not calibration & evaluation


def test_forwards_of_networks_are_timed_with_their_cosine(tmp_path, capsys, threads_as_before, monkeypatch):
    small = networks.Network("small", torch.nn.Linear(64, 128).eval(), (torch.randn(2, 64),))
    monkeypatch.setitem(forwards.NETWORKS, "recurrent", (lambda: [small], forwards.EAGER))
    file = tmp_path / "forwards.json"
    forwards.main(["--networks", "recurrent", "--rounds", "1", "--threads", "1", "--json", str(file)])
    cells = json.loads(file.read_text())["cells"]
    assert [cell["contender"] for cell in cells] == [*forwards.EAGER]
    assert all(cell["median"] > 0 and cell["cosine"] > 0.98 for cell in cells)
    assert "small" in capsys.readouterr().out


@pytest.mark.parametrize("network", networks.CONVOLUTIONAL)
def test_convolutional_networks_classify_an_image(network):
    with torch.no_grad():
        assert networks.CONVOLUTIONAL[network]().eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_layers_are_timed_beside_their_float_layers_and_checked(tmp_path, capsys, threads_as_before):
    file = tmp_path / "layers.json"
    layers.main(["--layer", "experts, 1 tokens", "--rounds", "1", "--threads", "1", "--json", str(file)])
    cells = json.loads(file.read_text())["cells"]
    assert [cell["contender"] for cell in cells] == ["float", *layers.VARIANTS]
    assert all(cell["median"] > 0 for cell in cells)
    assert "32 experts, 1 tokens, int4: " in capsys.readouterr().out


def test_a_layer_that_is_slower_than_its_float_layer_is_told_unless_it_is_an_exception():
    cells = [Cell({"layer": "Linear"}, name, [seconds]) for name, seconds in (("float", 1e-3), ("int8", 1.1e-3))]
    cells += [Cell({"layer": "Linear"}, "int4", [1.2e-3])]
    cells += [Cell({"layer": "Conv2d"}, name, [seconds]) for name, seconds in (("float", 1e-3), ("int4", 9e-3))]
    lines = layers.checks(Report("layers", {}, {}, {}, cells=cells))
    assert [line.partition(":")[0] for line in lines] == ["held", "NOT HELD"]
    assert lines[1].startswith("NOT HELD: Linear, int4: 0.83 times")


def test_quality_is_measured_for_each_variant_in_each_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vision, "_EPOCHS", 1)
    file = tmp_path / "quality.json"
    asked = ["--task", "convnet,transformer", "--variant", "int8,nf4 g32,int3 g64 qronos"]
    asked += ["--samples", "2", "--no-peers"]
    assert quality.main([*asked, "--threads", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["convnet"]
    names = ["float", "fewbits int8", "fewbits nf4 g32", "fewbits int3 g64 qronos", "fewbits int3 g64 qronos tuned"]
    assert [row["name"] for row in rows] == names
    assert rows[0]["KL"] == 0
    assert rows[1]["KL"] < rows[2]["KL"] < 0.5
    assert rows[1]["bits"] > 8 > rows[2]["bits"] > 4
    assert "left out" not in capsys.readouterr().out


def test_results_are_drawn_for_each_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"name": "float", "bits": 32, "seconds": 0, "KL": 0.0, "accuracy": 0.9}]
    rows += [
        {"name": f"fewbits int{bits}", "bits": bits, "seconds": 1, "KL": 2.0**-bits, "accuracy": 0.8} for bits in (4, 8)
    ]
    results = tmp_path / "quality.json"
    results.write_text(json.dumps({"convnet": rows, "settings": {}, "cells": []}))
    assert plot.main([str(results), str(tmp_path)]) == 0
    for figure in ("kl", "accuracy"):
        drawing = (tmp_path / f"convnet-{figure}.svg").read_text()
        assert "int4" in drawing
        assert "int8" in drawing


def test_quality_refuses_unknown_variants(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--variant", "int1"])
    assert "int1" in capsys.readouterr().err
