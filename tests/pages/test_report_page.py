"""The page of a report: what it shows, and that names of tensors do it no harm."""

import base64
import hashlib
import html
import json
import math
import re
import sys
from importlib.resources import files

import attrs
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits import Ledger, LedgerRow, Measurement, Report, TensorReport
from fewbits._table import printable
from fewbits.checkpoint.metadata import Metadata
from fewbits.checkpoint.saving import save as save_checkpoint
from fewbits.errors import ArgumentError, CheckpointError, FormatError
from fewbits.extend import Layout, SafetensorsSerializer
from support.checkpoints import forged_tensor, save, state
from support.compressed import Recipe, config, write
from support.compressed import quantized as quantized_by_hand
from support.html_pages import Page
from support.lifecycle_helpers import TiedLM, mlp, quantize_small

SPEC = fewbits.QuantSpec(4, "group", group_size=128)
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style></script><!--", "a' onclick='b",
    "&lt;b&gt;", "{{ 7 }}", "{% raw %}", "\u202egnp.exe", "line\nbreak\r\x00\x1b[2J", "\ud800lone", "重み.ж", " ", "",
]  # fmt: skip


def kept(name, reason="a bias is never quantized"):
    return LedgerRow(name, (8,), torch.float32, "kept", reason, 32, 32)


def quantized(name, shape=(64, 128)):
    elements = math.prod(shape)
    layout = Layout.of(shape)
    return LedgerRow(name, shape, torch.float32, "quantized", "selected", elements * 4, elements, SPEC, layout)


def tensor(name, noise=1.0, **fields):
    measured = Measurement(8192, 100.0, noise, 100.0, 100.0, 0.5, 0.9)
    return TensorReport(name, "quantized", str(SPEC), measured, spec=SPEC, **fields).judged(10)


def report(*rows, **fields):
    found = [tensor(row.name) if row.fate == "quantized" else TensorReport(row.name, row.fate, "") for row in rows]
    defaults = {"tensors": tuple(found), "checks": ("size",), "bytes_before": 400, "bytes_after": 100}
    return Report(**defaults | {"ledger": Ledger(rows)} | fields)


def fp8_source(path):
    """A checkpoint with a weight in FP8 and its scale, which is merged."""
    tensors = {"w.weight": torch.randn(16, 32).to(torch.float8_e4m3fn), "w.weight_scale": torch.tensor(0.5)}
    safetensors.torch.save_file(tensors, path)
    return path


def results(folder):
    """Reports with their ledgers: of a model with an alias, of a state dict, of a file with a merged scale."""
    fewbits.quantize(fp8_source(folder / "fp8"), "int8", output=folder / "small", min_elements=1)
    yield quantize_small(TiedLM()).report
    yield quantize_small(state(), "int4", group_size=8, embeddings="quantize").report
    yield fewbits.verify(folder / "small", folder / "fp8")
    yield report()


def test_every_tensor_and_every_reason_is_on_the_page_once(tmp_path):
    fates = set()
    for found in results(tmp_path):
        page = Page(found.show())
        assert sorted(row[0] for row in page.tensors) == sorted(row.name for row in found.ledger)
        groups = [tuple(row[1:3]) for row in page.tables["fates"][1:-1]]
        assert len(set(groups)) == len(groups)
        for row in found.ledger:
            cells = next(cells for cells in page.tensors if cells[0] == row.name)
            group = page.tables["fates"][int(cells[10])]
            reason = {"alias": "shares storage", "merged": "scales of dequantized weights"}.get(row.fate, row.reason)
            assert (group[1].split(" ")[0], group[2]) == (cells[2], reason) == (row.fate, reason)
            assert cells[7:9] == [f"{row.bytes_before:,}", f"{row.bytes_after:,}"]
        totals = page.tables["fates"][-1][3:6]
        assert totals == [f"{count:,}" for count in (len(found.ledger), *sums(found.ledger))]
        fates |= {row.fate for row in found.ledger}
    assert fates == {"quantized", "kept", "alias", "merged"}


def sums(ledger):
    return sum(row.bytes_before for row in ledger), sum(row.bytes_after for row in ledger)


def test_failures_come_first_then_the_lowest_quality():
    rows = [kept("bias"), quantized("good"), quantized("poor"), quantized("bad")]
    found = [
        TensorReport("bias", "kept", ""),
        tensor("good", 1e-3),
        tensor("poor"),
        tensor("bad", 1e-4, failures=("the bytes of bad_packed are not the bytes that were written",)),
    ]
    page = Page(report(*rows, tensors=tuple(found), general=("kl is above 0.1",)).show())
    assert page.lists["failures"] == ["kl is above 0.1", f"bad: {found[3].failures[0]}"]
    assert [row[0] for row in page.tensors] == ["bad", "poor", "good", "bias"]
    assert [row[9] for row in page.tensors] == ["failed", "fair", "good", ""]
    assert list(page.sections)[1:3] == ["failures", "summary"]
    assert "Failed: 2 failures" in page.sections[""]


def test_a_page_without_failures_has_no_section_for_them():
    page = Page(report(quantized("w")).show())
    assert "failures" not in page.sections
    assert "Passed" in page.sections[""]


@given(st.lists(st.text(st.characters(), max_size=30) | st.sampled_from(HOSTILE), unique=True, max_size=8))
def test_any_name_is_shown_as_text(names):
    page = Page(report(*map(quantized, names)).show())
    shown = [row[0] for row in page.tensors]
    assert sorted(shown) == sorted(map(printable, names))
    assert "".join(shown).isprintable()
    check_elements(page)


def test_hostile_texts_are_shown_as_text():
    for text in HOSTILE:
        failed = TensorReport("w", "quantized", text, failures=(text,), notes=(text,))
        found = report(quantized("w"), kept(text + "b", reason=text + "r"), tensors=(failed,))
        page = Page(attrs.evolve(found, checks=(text,), unchecked=(text,), general=(text,), about=(text,)).show())
        assert page.lists["failures"] == [printable(text), printable(f"w: {text}")]
        check_elements(page)


def check_elements(page):
    """Only elements of the template are there; nothing refers to another file, and one script may run."""
    template = files("fewbits.pages").joinpath("look", "report.html").read_text()
    known = set(re.findall(r"<([a-z][a-z0-9]*)", template))
    assert {name for name, _ in page.elements} <= known
    for _, fields in page.elements:
        assert not [key for key in fields if key.startswith("on")]
        assert fields.get("href", "#").startswith(("#", "data:,"))
        assert "src" not in fields
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(fields["content"] for _, fields in page.elements if "http-equiv" in fields)
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}';" in policy


def test_long_names_are_shortened_and_stay_different():
    names = [".".join(["block"] * 40 + [str(i)] + ["weight"] * 40) for i in range(3)] + ["x" * 100_000]
    shown = [row[0] for row in Page(report(*map(quantized, names)).show()).tensors]
    assert len(set(shown)) == 4
    assert max(map(len, shown)) <= 160


def test_the_same_report_gives_the_same_bytes():
    assert len({quantize_small(mlp()).report.show().html for _ in range(3)}) == 1


def test_ten_thousand_tensors_fit_into_three_megabytes():
    rows = [quantized(f"model.layers.{i // 7}.block_sparse_moe.experts.{i % 7}.weight") for i in range(10_000)]
    found = report(*rows)
    assert len(found.show().html.encode()) < 3_000_000


def test_an_empty_checkpoint_has_a_page(tmp_path):
    path = tmp_path / "empty.safetensors"
    save_checkpoint(SafetensorsSerializer(), path, Metadata(Ledger(())), lambda name: None, measured={})
    page = Page(fewbits.verify(path).show(checkpoint=path))
    assert page.tensors == []
    assert "There are no tensors." in page.sections["tensors"]


def test_a_report_without_a_ledger_shows_its_tensors():
    assert [row[0] for row in Page(report(ledger=None, tensors=(tensor("w"),)).show()).tensors] == ["w"]


@pytest.fixture
def written(tmp_path):
    """A source, and a result of it."""
    safetensors.torch.save_file({name: value.clone() for name, value in state().items()}, tmp_path / "in")
    save(tmp_path / "small.safetensors", state(), "int4", group_size=8)
    return tmp_path / "small.safetensors", tmp_path / "in"


def test_a_file_alone_shows_the_figures_that_it_records(written):
    path, _ = written
    page = Page(fewbits.verify(path).show(checkpoint=path))
    recorded = fewbits.verify(*written).tensors
    expected = {t.name: f"{t.measurement.sqnr_db:.2f}" for t in recorded if t.measurement}
    assert {row[0]: row[4] for row in page.tensors if row[4]} == expected
    assert "as measured when the file was written" in page.sections["summary"]
    assert "Histograms of errors" in page.sections["origin"]
    assert "weights: rms" in page.sections["worst"]
    assert "errors: rms" not in page.sections["worst"]
    assert f"fewbits {fewbits.__version__}" in page.sections["origin"]
    assert re.search(r"small\.safetensors\s*[0-9a-f]{64}", page.sections["origin"])


@pytest.mark.parametrize("against", [lambda path: path, lambda _: state()])
def test_a_source_adds_histograms_of_errors(written, against):
    path, source = written
    page = Page(fewbits.verify(path, source).show(checkpoint=path, against=against(source)))
    quantized = sum(bool(row[4]) for row in page.tensors)
    assert page.sections["worst"].count("errors: rms") == quantized > 2
    assert "Histograms of errors" not in page.sections["origin"]
    largest = max(t.measurement.max_abs_error for t in fewbits.verify(path, source).tensors if t.measurement)
    assert f"{largest:.3g}" in page.sections["worst"]


def test_a_damaged_tensor_fails_and_has_no_figures(written):
    path, source = written
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = fewbits.verify(path, source)
    page = Page(found.show(checkpoint=path, against=source))
    (failed,) = [t.name for t in found.tensors if t.failures]
    assert page.tensors[0][0] == failed
    assert page.tensors[0][4:7] == ["", "", ""]
    assert page.tensors[0][9] == "failed"
    assert failed not in page.sections.get("worst", "")


def test_a_scale_that_is_nan_is_shown(written):
    path, source = written
    scale = safetensors.torch.load_file(path)["layers.0.weight_scale"]
    scale[0, 0] = math.nan
    path.write_bytes(forged_tensor(path.read_bytes(), "layers.0.weight_scale", scale.numpy().tobytes()))
    page = Page(fewbits.verify(path, source).show(checkpoint=path, against=source))
    assert page.tensors[0][0] == "layers.0.weight"
    assert page.tensors[0][6] == "not finite"
    assert "1 of" in page.sections["summary"].partition("Proved bounds")[2]


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_of_another_tool(tmp_path, broken):
    source = {"a.weight": torch.randn(16, 24), "b.weight": torch.randn(16, 24), "a.bias": torch.randn(16)}
    tensors = quantized_by_hand(source, Recipe(), ("a.weight", "b.weight"))
    if broken:
        tensors["b.weight_scale"] = torch.ones(3, 3)
    path = write(tmp_path / "served", tensors, config(Recipe()))
    found = fewbits.verify(path, source)
    page = Page(found.show(checkpoint=path, against=source))
    assert sorted(row[0] for row in page.tensors) == ["a.bias", "a.weight", "b.weight"]
    assert found.ok == (not broken) == ("failures" not in page.sections)
    assert page.tensors[0][9] == ("failed" if broken else "fair")
    if not broken:
        assert "compressed-tensors" in page.sections["origin"]
        assert page.sections["worst"].count("errors: rms") == 2


def test_a_report_about_another_checkpoint_is_refused(written, tmp_path):
    path, source = written
    with pytest.raises(ArgumentError, match="other tensors"):
        report(quantized("w")).show(checkpoint=path)
    with pytest.raises(FormatError, match="not written by fewbits"):
        fewbits.verify(path).show(checkpoint=source)


def test_kernels_of_a_model(tmp_path):
    model = mlp()
    result = quantize_small(model)
    kernels = fewbits.explain(result.model, torch.ones(2, 16))
    page = Page(result.report.show(kernels=kernels))
    assert [row[:2] for row in page.tables["kernels"][1:]] == [[row.name, row.kernel] for row in kernels.rows]
    assert page.lists.get("kernels", []) == kernels.notes()
    assert "kernels=fewbits.explain" not in page.sections["origin"]


def test_figures_of_the_model_from_memory_and_from_a_file(tmp_path):
    batches = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    result = quantize_small(mlp(), evaluate=batches, metrics=["kl", "top1", "cosine"])
    result.save(tmp_path / "small.safetensors")
    texts = [
        Page(result.report.show()).sections["summary"],
        Page(fewbits.verify(tmp_path / "small.safetensors").show(checkpoint=tmp_path / "small.safetensors")).sections[
            "summary"
        ],
    ]
    for text in texts:
        assert f"Model: KL{result.report.model.figures['kl']:.4g} nats" in text
        assert "over 8 positions in 2 batches" in text
        assert "Least SQNR of an output" in text
    assert Page(result.report.show()).tensors[0][5] != ""


def test_a_notebook_shows_the_page_in_a_frame_of_its_own():
    shown = report(quantized('"><script>')).show()
    frame = shown._repr_html_()
    assert html.unescape(re.search(r' srcdoc="([^"]*)">', frame)[1]) == shown.html
    assert 'sandbox="allow-scripts"' in frame
    assert repr(shown).startswith("HtmlPage(")


def test_the_script_finds_its_elements():
    page = Page(report(quantized("w")).show())
    wanted = set(re.findall(r'getElementById\("([\w-]+)"\)', page.scripts[0]))
    wanted |= {f"by-{name}" for name in ("name", "fate", "status", "group")}
    assert wanted <= {fields.get("id") for _, fields in page.elements}
    assert [cell.partition(" ")[0] for cell in page.tables["all"][0]] == [
        "Tensor", "Shape", "Fate", "Stored", "SQNR", "Output", "Of", "Before", "After", "Verdict", "Reason",
    ]  # fmt: skip


def test_without_jinja2_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ArgumentError, match=r"fewbits\[report\]"):
        report(quantized("w")).save_html(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_saved_completely_or_not_at_all(tmp_path, monkeypatch):
    found, path = report(quantized("w")), tmp_path / "a.html"
    found.save_html(path)
    assert path.read_text(encoding="utf-8") == found.show().html
    with pytest.raises(ArgumentError, match="--replace"):
        found.save_html(path)
    with pytest.raises(ArgumentError, match=r"must end in \.html"):
        found.save_html(tmp_path / "model.safetensors", replace=True)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ArgumentError, match="directory"):
        found.save_html(tmp_path / "folder.html", replace=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        found.save_html(tmp_path / "nowhere" / "a.html")

    def full(path, data):
        path.write_bytes(data[:10])
        raise CheckpointError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr("fewbits.checkpoint.publishing.write_durably", full)
    with pytest.raises(CheckpointError, match=r"a\.html cannot be written: No space"):
        found.save_html(path, replace=True)
    assert path.read_text(encoding="utf-8") == found.show().html
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "folder.html"]


def test_a_curve_is_drawn(tmp_path):
    points = [{"bytes": 1000 * 2**i, "error": 3.0**-i} for i in range(6)]
    (tmp_path / "c.json").write_text(json.dumps({"points": points, "knee": 2, "chosen": 2, "error": "<b>KL</b>"}))
    page = Page(report(quantized("w")).show(curve=tmp_path / "c.json"))
    assert page.tables["curve"][1:] == [
        ["smallest", "1,000", "1"], ["largest", "32,000", "0.004115"], ["knee", "4,000", "0.1111"],
        ["chosen", "4,000", "0.1111"],
    ]  # fmt: skip
    assert "knee, chosen" in page.sections["curve"]
    assert "<b>KL</b> (logarithmic axis)" in page.sections["curve"]
    check_elements(page)
