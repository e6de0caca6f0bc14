"""The command line: output, files, and the exit code of every failure."""

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.cli.commands import run as run_cli
from fewbits.config.config import QuantizationConfig
from support.checkpoints import split, state
from support.compressed import Recipe, config, write
from support.compressed import quantized as quantized_by_hand


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a float checkpoint `in` and nothing else."""
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state().items()}, "in")
    return tmp_path


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr("fewbits.cli.progress.monotonic", lambda: 0.0)  # a slow machine would print progress
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        code = run_cli()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def quantized(cli):
    """The same directory with `out`, made from `in`."""
    assert cli("quantize", "in", "-o", "out", "--scheme", "int8")[0] == 0
    return cli


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "int4", "fp16"])
def test_quantize_inspect_verify(cli, folder, scheme):
    code, out, err = cli("quantize", "in", "-o", "out", "--scheme", scheme)
    assert (code, err) == (0, "")
    assert "written: out" in out
    assert "passed" in out
    code, out, err = cli("inspect", "out")
    assert (code, err) == (0, "")
    assert fewbits.__version__ in out
    code, out, err = cli("verify", "out", "--against", "in")
    assert (code, err) == (0, "")
    assert "passed" in out
    assert sorted(os.listdir(folder)) == ["in", "out"]


def test_the_command_and_the_library_write_the_same_file(quantized, folder):
    fewbits.quantize("in", "int8", output="by library")
    assert (folder / "out").read_bytes() == (folder / "by library").read_bytes()


def test_with_json_standard_output_is_one_document(cli):
    code, out, err = cli("quantize", "in", "-o", "out", "--scheme", "int4", "--group-size", 64, "--json")
    printed = json.loads(out)
    assert (code, printed["output"], printed["report"]["ok"]) == (0, "out", True)
    assert all("event" in json.loads(line) for line in err.splitlines())
    assert printed["ledger"]["bytes_after"] == printed["report"]["bytes_after"]
    inspected = json.loads(cli("inspect", "out", "--json")[1])
    assert inspected["ledger"] == printed["ledger"]
    assert inspected["metrics"].keys() == {row["name"] for row in inspected["ledger"]["rows"] if row["spec"]}
    verified = json.loads(cli("verify", "out", "--against", "in", "--json")[1])
    assert verified["tensors"] == printed["report"]["tensors"]


def test_inspect_prints_how_the_outputs_of_the_model_compare_if_the_file_says_so(cli):
    model, batches = torch.nn.Linear(64, 16), [torch.randn(8, 64)]
    result = fewbits.quantize(model, "int8", evaluate=batches, metrics=["kl", "sqnr"])
    result.save("out")
    printed, weight = " ".join(cli("inspect", "out")[1].split()), result.report.tensors[0]
    assert f"positions 8, broken 0, kl {result.report.model.figures['kl']:.6g}" in printed
    assert f"output SQNR of 1 weights on data: least {weight.output_sqnr_db:.2f} dB (weight)" in printed
    inspected = json.loads(cli("inspect", "out", "--json")[1])
    assert inspected["model_metrics"]["sqnr"] == pytest.approx(result.report.model.figures["sqnr"], rel=1e-5)
    assert inspected["output_sqnr_db"] == {"weight": pytest.approx(weight.output_sqnr_db, rel=1e-5)}


def test_a_failure_with_json_is_a_document(quantized, folder):
    flip_last_bit(folder / "out")
    code, out, _ = quantized("verify", "out", "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "out"],
        ["verify", "out"],
        ["verify", "out", "--against", "in"],
        ["quantize", "in", "-o", "out", "--replace", "--scheme", "int8"],
    ],
)
def test_tensors_prints_every_tensor(quantized, command):
    few, all_of_them = quantized(*command)[1], quantized(*command, "--tensors")[1]
    assert all(name in all_of_them for name in state())
    assert not all(name in few for name in state())


def test_warnings_are_in_the_summary_and_do_not_change_the_exit_code(cli, folder):
    safetensors.torch.save_file({"rough.weight": torch.linspace(-1, 1, 256).repeat(4, 1) ** 15}, folder / "in")
    code, out, err = cli("quantize", "in", "-o", "out", "--scheme", "int4", "--group-size", 256)
    assert (code, err) == (0, "")
    assert "warning: 1 of 1 tensors are below 20 dB" in out
    assert "(rough.weight)" in out


@pytest.fixture(params=[80, 60])
def columns(monkeypatch, request):
    """Standard output is a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setattr("fewbits.cli.printing.is_terminal", lambda: True)
    return request.param


LONG = [f"model.decoder.layers.{i}.block_sparse_moe.experts.{j}.down_proj.weight" for i in range(2) for j in range(3)]


@pytest.fixture
def moe(folder):
    """A checkpoint whose names are long, and whose 4-bit codes are rough."""
    rough = torch.linspace(-1, 1, 256).repeat(4, 1) ** 15
    safetensors.torch.save_file({name: rough.clone() for name in LONG}, folder / "moe")


COMMANDS = [
    ["quantize", "moe", "--scheme", "int4", "--dry-run"],
    ["quantize", "moe", "-o", "made", "--scheme", "int4", "--group-size", "256"],
    ["inspect", "made"],
    ["verify", "made", "--against", "moe"],
]


def test_output_on_a_terminal_fits_its_columns(cli, moe, columns):
    for command in COMMANDS:
        code, out, _ = cli(*command)
        assert code == 0
        assert max(map(len, out.splitlines())) <= columns
    for command in (COMMANDS[0], *COMMANDS[2:]):
        out = cli(*command, "--tensors")[1]
        assert max(map(len, out.splitlines())) <= columns
        shown = re.findall(r"^(\S*\.\.\.\S*weight)  ", out, re.MULTILINE)
        assert len(set(shown)) == len(shown) == len(LONG)


@pytest.mark.parametrize(("no_color", "colored"), [(None, True), ("", True), ("1", False)])
def test_verdicts_have_colors_on_a_terminal_only_and_never_with_no_color(cli, monkeypatch, no_color, colored):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert "\x1b" not in cli("quantize", "in", "-o", "piped", "--scheme", "int8")[1]
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with contextlib.redirect_stdout(terminal):
        assert cli("quantize", "in", "-o", "out", "--scheme", "int8")[0] == 0
    assert ("\x1b[32mpassed\x1b[0m: " in terminal.getvalue()) == colored
    assert ("\x1b" in terminal.getvalue()) == colored


def test_in_a_pipe_summaries_fit_80_columns_and_names_are_complete(cli, moe):
    for command in COMMANDS:
        assert max(map(len, cli(*command)[1].splitlines())) <= 80
    for command in (COMMANDS[0], *COMMANDS[2:]):
        out = cli(*command, "--tensors")[1]
        assert all(any(line.startswith(name + " ") for line in out.splitlines()) for name in LONG)


def test_include_and_exclude_choose_tensors(cli):
    rows = json.loads(
        cli("quantize", "in", "-o", "a", "--scheme", "int8", "--include", "layers", "--exclude", "layers.1", "--json")[
            1
        ]
    )["ledger"]["rows"]
    assert [row["name"] for row in rows if row["fate"] == "quantized"] == ["layers.0.weight"]


@pytest.mark.parametrize(("options", "fate"), [([], "kept"), (["--embeddings", "quantize"], "quantized")])
def test_embeddings_are_quantized_by_int4_on_request(cli, options, fate):
    out = cli("quantize", "in", "-o", "a", "--scheme", "int4", "--group-size", 48, "--json", *options)[1]
    rows = {row["name"]: row["fate"] for row in json.loads(out)["ledger"]["rows"]}
    assert rows["embeddings.weight"] == fate


def rows_of(out):
    return {row["name"]: row for row in json.loads(out)["ledger"]["rows"]}


def test_override_gives_the_tensors_of_a_pattern_another_scheme(cli):
    options = ["--override", "layers=int4:50", "--override", "embeddings=keep", "--override", "half=int8-tensor"]
    code, out, _ = cli("quantize", "in", "-o", "a", "--scheme", "int8", "--json", *options)
    assert code == 0
    rows = rows_of(out)
    spec = rows["layers.0.weight"]["spec"]
    assert (spec["bits"], spec["group_size"]) == (4, 50)
    assert rows["embeddings.weight"]["fate"] == "kept"
    assert rows["half.weight"]["spec"]["granularity"] == "tensor"


def test_schemes_group_sizes_and_the_dtype_of_scales_are_options(cli):
    options = ["--scheme", "nf4", "--scale-dtype", "float16", "--override", "layers.1=int3:27", "--min-elements", 1]
    code, out, _ = cli("quantize", "in", "-o", "out", "--json", *options)
    assert code == 0
    specs = {name: row["spec"] for name, row in rows_of(out).items() if row["spec"]}
    assert (len(specs["layers.0.weight"]["levels"]), specs["layers.0.weight"]["group_size"]) == (16, 64)
    assert (specs["layers.1.weight"]["bits"], specs["layers.1.weight"]["group_size"]) == (3, 27)
    assert {spec["scale_dtype"] for spec in specs.values()} == {"float16"}
    assert cli("verify", "out", "--against", "in")[0] == 0


def test_a_scale_dtype_that_does_not_exist_is_refused_with_the_others(cli):
    code, out, err = cli("quantize", "in", "-o", "a", "--scheme", "int8", "--scale-dtype", "half")
    assert (code, out) == (2, "")
    assert "'float16'" in err


def test_the_pattern_of_an_override_may_hold_an_equals_sign(cli):
    out = cli("quantize", "in", "-o", "a", "--scheme", "int8", "--override", "re:[ha=lf]+=fp16", "--json")[1]
    assert json.loads(out)["config"]["overrides"] == {"re:[ha=lf]+": "fp16"}


def test_a_repeated_override_takes_the_last_place(cli):
    options = [part for rule in ("layers.0=int4", "layers=keep", "layers.0=fp16") for part in ("--override", rule)]
    printed = json.loads(cli("quantize", "in", "-o", "a", "--scheme", "int8", "--json", *options)[1])
    assert list(printed["config"]["overrides"].items()) == [("layers", "keep"), ("layers.0", "fp16")]
    assert next(row["fate"] for row in printed["ledger"]["rows"] if row["name"] == "layers.0.weight") == "cast"


@pytest.mark.parametrize(("least", "fate"), [(433, "kept"), (432, "quantized")])
def test_min_elements_keeps_smaller_tensors(cli, least, fate):
    out = cli("quantize", "in", "-o", "a", "--scheme", "int8", "--min-elements", least, "--json")[1]
    assert rows_of(out)["layers.1.weight"]["fate"] == fate


@pytest.mark.parametrize(("ragged", "bits"), [("shorter", 4), ("fallback", 8)])
def test_ragged_decides_the_scheme_of_rows_that_groups_do_not_divide(cli, ragged, bits):
    out = cli("quantize", "in", "-o", "a", "--scheme", "int4", "--ragged", ragged, "--json")[1]
    assert rows_of(out)["layers.0.weight"]["spec"]["bits"] == bits


def test_ragged_rows_can_be_refused(cli, folder):
    code, out, err = cli("quantize", "in", "-o", "a", "--scheme", "int4", "--ragged", "error")
    assert (code, out) == (2, "")
    assert "layers.0.weight" in err
    assert os.listdir(folder) == ["in"]


# A config file.

CONFIG = {"scheme": "int4", "group_size": 40, "exclude": ["embeddings"], "overrides": {"half": "int8"}}


@pytest.fixture
def configured(cli, folder):
    """The same directory with `config.json`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return cli


def test_a_config_file_replaces_the_options(configured, folder):
    code, out, err = configured("quantize", "in", "-o", "out", "--config", "config.json")
    assert (code, err) == (0, "")
    assert "written: out" in out
    config = QuantizationConfig.from_file(folder / "config.json")
    fewbits.quantize("in", config=config, output="by library")
    assert (folder / "out").read_bytes() == (folder / "by library").read_bytes()


def test_a_config_file_may_be_toml(cli, folder):
    (folder / "c.toml").write_text('scheme = "int4"\n[overrides]\nhalf = {scheme = "int4", group_size = 17}\n')
    code, out, _ = cli("quantize", "in", "-o", "out", "--config", "c.toml", "--json")
    assert code == 0
    assert rows_of(out)["half.weight"]["spec"]["group_size"] == 17


@pytest.mark.parametrize(
    ("options", "setting", "value"),
    [
        ([], "group_size", 40),
        (["--group-size", 20], "group_size", 20),
        (["--exclude", "layers"], "exclude", ["layers"]),
        (["--include", "half", "--include", "layers"], "include", ["half", "layers"]),
        (["--override", "layers=int8"], "overrides", {**CONFIG["overrides"], "layers": "int8"}),
        (["--override", "half=keep"], "overrides", {"half": "keep"}),
        (["--ragged", "fallback"], "ragged", "fallback"),
        (["--min-elements", 0], "min_elements", 0),
        (["--embeddings", "int8"], "embeddings", "int8"),
        (["--fail-under", 5], "fail_under", 5.0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_replace_settings_of_the_file_and_these_replace_defaults(configured, options, setting, value):
    code, out, _ = configured("quantize", "in", "-o", "out", "--config", "config.json", "--json", *options)
    assert code == 0
    effective = json.loads(out)["config"]
    assert effective == (QuantizationConfig(**CONFIG).to_dict() | {setting: value})


def test_a_scheme_on_the_command_line_replaces_that_of_the_file(cli, folder):
    (folder / "config.json").write_text(json.dumps({"scheme": "int4", "exclude": ["layers"]}))
    out = cli("quantize", "in", "-o", "out", "--config", "config.json", "--scheme", "fp16", "--json")[1]
    rows = rows_of(out)
    assert (rows["layers.0.weight"]["fate"], rows["embeddings.weight"]["fate"]) == ("kept", "cast")


def test_the_config_in_the_json_is_a_config_file(cli, folder):
    options = ["--scheme", "int4", "--group-size", 50, "--exclude", "half", "--override", "layers.1=keep"]
    printed = json.loads(cli("quantize", "in", "-o", "out", *options, "--json")[1])
    (folder / "config.json").write_text(json.dumps(printed["config"]))
    again = json.loads(cli("quantize", "in", "-o", "again", "--config", "config.json", "--json")[1])
    assert again["config"] == printed["config"]
    assert (folder / "again").read_bytes() == (folder / "out").read_bytes()


@pytest.mark.parametrize("reaction", ["error", "warn", "ignore"])
def test_a_failure_sets_the_exit_code_for_every_on_failure_of_the_file(cli, folder, reaction):
    (folder / "c.json").write_text(json.dumps({"scheme": "int8", "fail_under": 60, "on_failure": reaction}))
    code, out, err = cli("quantize", "in", "-o", "out", "--config", "c.json")
    assert (code, err) == (1, "")
    assert "is below 60 dB" in out


def test_no_validate_is_printed(cli):
    code, out, _ = cli("quantize", "in", "-o", "a", "--scheme", "int8", "--no-validate")
    assert code == 0
    assert "not validated" in out
    assert (
        json.loads(cli("quantize", "in", "-o", "b", "--scheme", "int8", "--no-validate", "--json")[1])["report"] is None
    )


def test_replace_replaces_an_existing_file(quantized):
    assert quantized("quantize", "in", "-o", "out", "--scheme", "int4", "--replace")[0] == 0
    assert "int4" in quantized("inspect", "out")[1]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["quantize", "-h"], ["inspect", "-h"], ["verify", "-h"]])
def test_help_exits_with_0(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage:")


def test_version(cli):
    code, out, _ = cli("--version")
    assert code == 0
    assert fewbits.__version__ in out


# Exit code 1: the command ran, but the result is wrong.


@pytest.mark.parametrize("against", [[], ["--against", "in"]])
def test_a_tampered_file_fails_verification_by_name(quantized, folder, against):
    flip_last_bit(folder / "out")
    code, out, _ = quantized("verify", "out", *against)
    assert code == 1
    assert "failure: " in out
    assert "not the bytes that were written" in out


def test_a_tampered_header_fails_verification(quantized, folder):
    data = (folder / "out").read_bytes()
    (folder / "out").write_bytes(data.replace(b"int8 channel", b"int9 channel", 1))
    code, out, err = quantized("verify", "out")
    assert (code, out) == (1, "")
    assert "header" in err


def test_another_source_fails_verification(quantized, folder):
    tensors = {name: tensor.clone() for name, tensor in state(seed=1).items()}
    safetensors.torch.save_file(tensors, folder / "in")
    code, out, _ = quantized("verify", "out", "--against", "in")
    assert code == 1
    assert "FAILED" in out


def test_files_of_another_tool_are_verified(cli, folder):
    original, recipe = {name: tensor.clone() for name, tensor in state().items()}, Recipe(8, None)
    tensors = quantized_by_hand(original, recipe, ("layers.0.weight",))
    write(folder / "model", tensors, config(recipe))
    code, out, _ = cli("verify", "model", "--against", "in")
    assert code == 0
    assert "not checked: digests" in out
    tensors["layers.0.weight_packed"].zero_()
    write(folder / "model", tensors, config(recipe))
    code, out, _ = cli("verify", "model", "--against", "in")
    assert code == 1
    assert "failure: layers.0.weight: all of its codes are -128" in out


def test_fail_under_sets_the_limit_of_failures(quantized):
    assert quantized("verify", "out", "--against", "in", "--fail-under", 30)[0] == 0
    assert quantized("verify", "out", "--against", "in", "--fail-under", 60)[0] == 1
    code, out, _ = quantized("quantize", "in", "-o", "other", "--scheme", "int8", "--fail-under", 60)
    assert code == 1
    assert "is below 60 dB" in out


# Exit code 2: it cannot be done as asked. One paragraph says why, and nothing is left behind.

QUANTIZE = ["quantize", "in", "-o", "out", "--scheme", "int8"]


def nan_in_source(folder):
    tensors = safetensors.torch.load_file(folder / "in")
    tensors["layers.0.weight"][5, 6] = float("nan")
    safetensors.torch.save_file(tensors, folder / "in")


def beyond_half(folder):
    safetensors.torch.save_file({"big.weight": torch.full((64, 64), 1e6)}, folder / "in")


def own_output(folder):
    fewbits.quantize(folder / "in", "int8", output=folder / "made")
    (folder / "made").replace(folder / "in")


@pytest.mark.parametrize(
    ("arguments", "before", "message"),
    [
        pytest.param(["quantize", "missing", *QUANTIZE[2:]], None, "missing does not exist", id="missing IN"),
        pytest.param(["inspect", "missing"], None, "missing does not exist", id="missing FILE"),
        pytest.param(["verify", "missing"], None, "missing does not exist", id="missing FILE to verify"),
        pytest.param(["verify", "in"], None, "not written by fewbits", id="verify a plain file"),
        pytest.param(["inspect", "in"], None, "not written by fewbits", id="inspect a plain file"),
        pytest.param([*QUANTIZE[:-1], "int9"], None, "int9", id="no such scheme"),
        pytest.param([*QUANTIZE, "--exclude", "layer"], None, "did you mean 'layers'", id="pattern without a match"),
        pytest.param([*QUANTIZE, "--include", "re:("], None, "not a valid regular expression", id="bad pattern"),
        pytest.param([*QUANTIZE, "--exclude", "re:.*"], None, "nothing is left to quantize", id="everything skipped"),
        pytest.param([*QUANTIZE, "--group-size", "64"], None, "group_size", id="group size with int8"),
        pytest.param([*QUANTIZE[:-1], "int4", "--group-size", "0"], None, "group_size", id="group size zero"),
        pytest.param([*QUANTIZE[:-1], "int4", "--group-size", "x"], None, "group-size", id="group size no number"),
        pytest.param(["quantize", "in", "-o", "in", "--scheme", "int8"], None, "in exists", id="OUT exists"),
        pytest.param(
            ["quantize", "in", "-o", "in", "--scheme", "int8", "--replace"], None, "source itself", id="OUT is IN"
        ),
        pytest.param(["quantize", ".", *QUANTIZE[2:]], None, "is a directory", id="IN a directory"),
        pytest.param(["quantize", "in", "-o", ".", "--scheme", "int8"], None, "is a directory", id="OUT a directory"),
        pytest.param(
            ["quantize", "in", "-o", ".", "--scheme", "int8", "--replace"],
            None,
            "is a directory",
            id="OUT a directory, forced",
        ),
        pytest.param(["quantize", "in", "-o", "no/out", "--scheme", "int8"], None, "no/out", id="OUT in no directory"),
        pytest.param(QUANTIZE, nan_in_source, r"layers.0.weight", id="NaN"),
        pytest.param([*QUANTIZE[:-1], "fp16"], beyond_half, "big.weight", id="beyond half precision"),
        pytest.param(QUANTIZE, own_output, "written by fewbits", id="IN is quantized"),
        pytest.param(["verify", "in", "--against", "in"], own_output, "written by fewbits", id="SOURCE is quantized"),
        pytest.param(
            QUANTIZE, lambda folder: (folder / "in").write_text("text"), "in is text, which holds no", id="IN is text"
        ),
        pytest.param(["quantize", "in"], None, "--output", id="no OUT"),
        pytest.param(QUANTIZE[:-2], None, "Missing option '--scheme': one of int8-tensor, int8", id="no scheme"),
        pytest.param([*QUANTIZE[:-2], "--config", "no.json"], None, "no.json: cannot be read", id="missing config"),
        pytest.param([*QUANTIZE, "--config", "in"], None, "in: the name of a config file ends in", id="no config"),
        pytest.param([*QUANTIZE, "--override", "layers"], None, "--override layers: write PATTERN=", id="no rule"),
        pytest.param([*QUANTIZE, "--embeddings", "int4:"], None, "--embeddings: write SCHEME", id="embeddings"),
        pytest.param([*QUANTIZE, "--override", "=int8"], None, "--override =int8: write PATTERN", id="no pattern"),
        pytest.param([*QUANTIZE, "--override", "a="], None, "--override a=: write SCHEME", id="empty rule"),
        pytest.param([*QUANTIZE, "--override", "a=int4:"], None, "int4:64 or nf4:32:6", id="override without size"),
        pytest.param([*QUANTIZE, "--override", "a=int4:-1"], None, "int4:64 or nf4:32:6", id="override of size -1"),
        pytest.param([*QUANTIZE, "--override", "a=int9"], None, "there is no scheme 'int9'", id="no such override"),
        pytest.param([*QUANTIZE, "--override", "lay=int4"], None, "did you mean 'layers'", id="override of nothing"),
        pytest.param([*QUANTIZE, "--min-elements", "-1"], None, "min_elements must be", id="negative min elements"),
        pytest.param([*QUANTIZE, "--ragged", "short"], None, "'short' is not one of", id="no such ragged"),
        pytest.param([*QUANTIZE, "--fail-under", "nan"], None, "fail_under must be a number", id="NaN as a threshold"),
        pytest.param(["polish", "in"], None, "polish", id="no such command"),
        pytest.param([*QUANTIZE, "--no-such-option"], None, "--no-such-option", id="no such option"),
    ],
)
def test_an_error_is_one_paragraph(cli, folder, arguments, before, message):
    if before:
        before(folder)
    content = (folder / "in").read_bytes()
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert "\n\n" not in err.partition("Error: ")[2] + err.partition("fewbits: ")[2]
    assert [(entry.name, entry.read_bytes()) for entry in folder.iterdir()] == [("in", content)]


@pytest.mark.parametrize("target", ["a file", "a directory", "nothing"])
def test_a_link_exists_even_without_a_target(cli, folder, target):
    if target == "a file":
        (folder / "target").write_text("old")
    elif target == "a directory":
        (folder / "target").mkdir()
    (folder / "out").symlink_to("target")
    code, out, err = cli(*QUANTIZE)
    assert (code, out) == (2, "")
    assert "out exists; pass --replace" in err
    assert (folder / "target").exists() == (target != "nothing")
    assert cli(*QUANTIZE, "--replace")[0] == (2 if target == "a directory" else 0)
    assert (folder / "out").is_symlink()
    if target != "a directory":
        assert cli("verify", "target", "--against", "in")[0] == 0


def test_a_link_to_nothing_is_not_written_through_by_resume(cli, folder):
    (folder / "out").symlink_to("target")
    assert cli(*QUANTIZE, "--resume")[0] == 2
    assert not (folder / "target").exists()
    assert cli(*QUANTIZE, "--resume", "--replace")[0] == 0


def test_the_source_of_another_model_is_recognized_by_names(quantized, folder):
    other = {f"model.{name}": tensor.clone() for name, tensor in state().items()}
    safetensors.torch.save_file(other, folder / "other")
    code, out, _ = quantized("verify", "out", "--against", "other")
    assert code == 1
    assert re.search(r"failure: no name in the source \(such as model\.\S+\) is in the file", out)
    assert out.count("failure: ") == 1
    assert "not checked: errors: the source is not what the file was made from" in out
    assert "no source" not in out.replace("no name in the source", "")
    safetensors.torch.save_file({**other, **{name: t.clone() for name, t in state().items()}}, folder / "other")
    code, out, _ = quantized("verify", "out", "--against", "other")
    assert code == 1
    assert "is in the source, not in the file's ledger" in out
    assert "not checked: errors: the source is not what the file was made from" in out


def test_a_full_disk_is_one_paragraph(cli, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = cli(*QUANTIZE)
    assert (code, out) == (2, "")
    assert "No space left on device" in err
    assert os.listdir(folder) == ["in"]  # nothing had been done by then


def test_an_interruption_is_reported_and_leaves_nothing(cli, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    code, _, err = cli(*QUANTIZE)
    assert code != 0
    assert "interrupted" in err
    assert os.listdir(folder) == ["in"]


def test_an_interruption_that_leaves_work_says_how_to_continue(cli, folder, monkeypatch):
    def interrupt(step):
        if step.done:
            raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.cli.quantizing.shown_progress", lambda **_: contextlib.nullcontext(interrupt))
    code, out, err = cli(*QUANTIZE)
    assert (code, out) == (2, "")
    assert err.startswith("fewbits: interrupted; finished work is kept: continue with --resume")
    assert sorted(name.partition("-")[0] for name in os.listdir(folder)) == [".fewbits", "in"]


def test_an_interrupted_check_names_the_written_file_and_the_command_to_check_it(cli, folder, monkeypatch):
    def interrupt_the_check(step):
        if step.activity == "validate":
            raise KeyboardInterrupt

    monkeypatch.setattr(
        "fewbits.cli.quantizing.shown_progress", lambda **_: contextlib.nullcontext(interrupt_the_check)
    )
    code, _, err = cli(*QUANTIZE)
    assert code == 2
    assert err == ("fewbits: interrupted; out is complete, but not verified yet: fewbits verify out --against in\n")
    assert sorted(os.listdir(folder)) == ["in", "out"]


# Processes of their own.


def fewbits_process(*arguments, **options):
    command = [sys.executable, "-m", "fewbits", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_python_m_fewbits_passes_on_the_exit_code_and_prints_no_progress_of_a_short_run(folder):
    done = fewbits_process(*QUANTIZE, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    done = fewbits_process("inspect", "in", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fewbits: in ")


def test_main_can_be_called_more_than_once(folder):
    code = """
        import sys
        import fewbits.cli
        for _ in range(2):
            sys.argv = ["fewbits", "--version"]
            try:
                fewbits.cli.main()
            except SystemExit as stop:
                assert stop.code == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


BLOCKED = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
runpy.run_module("fewbits", run_name="__main__")
"""


@pytest.mark.parametrize("package", ["click", "rich"])
def test_without_the_extra_the_error_names_the_package(package):
    done = subprocess.run([sys.executable, "-c", BLOCKED, package], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fewbits: the command line needs {package}: pip install 'fewbits[cli]'\n"


def test_a_dry_run_predicts_the_result_and_writes_nothing(cli, folder):
    options = ["quantize", "in", "--scheme", "int4", "--group-size", 48, "--max-shard-size", "3kB"]
    code, out, err = cli(*options, "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, err) == (0, "")
    assert sorted(os.listdir(folder)) == ["in"]
    done = json.loads(cli(*options, "-o", "out", "--json")[1])
    assert planned["ledger"] == done["ledger"]
    for shard in planned["shards"]:
        payload = split((folder / "out" / shard["file"]).read_bytes())[1]
        assert len(payload) == shard["bytes"]
    assert sum(shard["bytes"] for shard in planned["shards"]) == done["ledger"]["bytes_after"]


def test_a_dry_run_groups_tensors_by_fate_and_lists_them_on_request(cli):
    dry_run = ("quantize", "in", "--scheme", "int8", "--dry-run")
    few, all_of_them = cli(*dry_run)[1], cli(*dry_run, "--tensors")[1]
    assert not any(name in few for name in state())
    assert all(name in all_of_them for name in state())
    cli("quantize", "in", "-o", "out", "--scheme", "int8")
    assert few.splitlines()[:-2] == cli("inspect", "out")[1].splitlines()[1:]


def test_a_dry_run_prints_every_file(cli, folder):
    code, out, err = cli("quantize", "in", "--scheme", "int8", "--max-shard-size", "3kB", "--dry-run")
    assert (code, err) == (0, "")
    assert "model-00001-of-" in out
    assert "nothing was written" in out
    assert "in-quantized.safetensors: " in cli("quantize", "in", "--scheme", "int8", "--dry-run")[1]


def test_a_directory_becomes_a_directory(cli, folder):
    (folder / "model").mkdir()
    (folder / "in").rename(folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "training_args.bin").write_text("pickled")
    code, out, err = cli(
        "quantize", "model", "-o", "out", "--scheme", "int8", "--max-shard-size", "3kB", "--threads", 2
    )
    assert (code, err) == (0, "")
    assert "left behind: training_args.bin" in out
    assert (folder / "out" / "config.json").read_text() == "{}"
    assert cli("verify", "out", "--against", "model")[0] == 0
    assert "written by fewbits" in cli("inspect", "out")[1]
    code, _, err = cli("quantize", "model", "-o", "out", "--scheme", "int8")
    assert (code, "--replace" in err) == (2, True)
    assert cli("quantize", "model", "-o", "out", "--scheme", "int8", "--replace")[0] == 0
    assert sorted(os.listdir(folder / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("option", "value"), [("--max-shard-size", "lots"), ("--threads", "0")])
def test_a_senseless_option_is_a_usage_error(cli, folder, option, value):
    code, _, err = cli("quantize", "in", "-o", "out", "--scheme", "int8", option, value)
    assert (code, os.listdir(folder)) == (2, ["in"])
    assert option.strip("-").replace("-", "_") in err


def test_names_with_markup_or_without_an_encoding_are_shown(folder):
    safetensors.torch.save_file({"[/x].weight": torch.rand(32, 32)}, folder / "in")
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fewbits", "quantize", "in", "-o", "caf\xe9", "--scheme", "int8"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "written: caf" in done.stdout) == (0, True), done.stderr


def test_an_impossible_output_name_is_a_usage_error(cli):
    code, out, err = cli("quantize", "in", "-o", "x" * 300, "--scheme", "int8")
    assert (code, out) == (2, "")
    assert "cannot be written" in err
