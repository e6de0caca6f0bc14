"""Directories of transformers, quantized with text or with what the model writes."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fewbits
from fewbits.cli.commands import run as run_cli
from fewbits.errors import ArgumentError, CalibrationError, MismatchError
from fewbits.integrations.text import cut_windows, read_texts, refuse_overlap
from fewbits.integrations.transformers import load_directory, quantize_directory
from support.transformers_sizes import TEXT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
tokens = pytest.importorskip("support.tokens")

WORDS, write_tokenizer = tokens.WORDS, tokens.write_tokenizer

INT4 = {"scheme": "int4", "group_size": 32, "min_elements": 0}
HOW = {"samples": 6, "sequence": 16}


def write_words(path: Path, count: int, seed: int = 0) -> None:
    draws = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(WORDS[at] for at in draws.tolist()), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a tiny Llama with a tokenizer of words. Its output layer is tied, so no file holds it."""
    folder = tmp_path_factory.mktemp("llama") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, eos_token="</s>", bos_token="<s>")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    write_words(path, 500)
    return path


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        code = run_cli()
        return code, *capsys.readouterr()

    return run


COMMAND = ["--scheme", "int4", "--group-size", "32", "--samples", "6", "--sequence", "16"]


def test_the_command_line_calibrates_a_directory_with_text(cli, source, text, tmp_path):
    out = tmp_path / "out"
    code, printed, err = cli(
        "quantize", source, "-o", out, *COMMAND, "--rounding", "qronos", "--calibrate", text, "--json"
    )
    assert code == 0, err
    steps = [json.loads(line) for line in err.splitlines()]
    activities = list(dict.fromkeys(step["activity"] for step in steps if step["event"] == "progress"))
    assert activities == ["observe", "calibrate", "convert", "validate"]
    said = json.loads(printed)
    assert said["opens_in"] == "opens in transformers, with compressed-tensors installed"
    reasons = {row["name"]: row["reason"] for row in said["ledger"]["rows"] if row["fate"] == "quantized"}
    assert len(reasons) == 14
    assert all(reason.endswith("; codes by Qronos(damping=0.01, refits=2, steps=12)") for reason in reasons.values())
    assert {file.name for file in source.iterdir()} == {file.name for file in out.iterdir()}
    assert cli("verify", out, "--against", source)[0] == 0
    model, found = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()


@pytest.mark.parametrize("rounding", ["gptq", "qronos"])
def test_calibrated_codes_go_out_unchanged_in_another_format(cli, source, text, tmp_path, rounding):
    calibrated = [*COMMAND, "--rounding", rounding, "--calibrate", text, "-q"]
    assert cli("quantize", source, "-o", tmp_path / "small", *calibrated)[0] == 0
    code, _, err = cli("quantize", source, "-o", tmp_path / "served", *calibrated, "--format", "compressed-tensors")
    assert (code, sorted(path.name for path in tmp_path.iterdir())) == (0, ["served", "small"]), err
    found, count = load_file(tmp_path / "served" / "model.safetensors"), 0
    for name, value in fewbits.load(tmp_path / "small").items():
        if isinstance(value, fewbits.QuantizedTensor):
            count += 1
            assert torch.equal(found[f"{name}_packed"], value.packed)
            assert torch.equal(found[f"{name}_scale"], value.scale)
    assert count == 14


def test_a_calibrated_directory_has_the_codes_of_the_model_quantized_in_memory(source, text, tmp_path):
    result = quantize_directory(source, calibrate=text, output=tmp_path / "out", rounding="qronos", **HOW, **INT4)
    assert result.report.ok
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    data = load_directory(source).windows(text, **HOW)
    expected = fewbits.quantize(model, rounding="qronos", data=data, samples=None, **INT4).model
    found = fewbits.load(tmp_path / "out")
    quantized = [name for name, value in found.items() if isinstance(value, fewbits.QuantizedTensor)]
    assert len(quantized) == 14
    for name in quantized:
        module, _, local = name.rpartition(".")
        assert torch.equal(found[name].dequantize(), getattr(expected.get_submodule(module), local)), name


def test_a_model_calibrated_with_text_is_closer_to_the_float_model_than_plain_rounding(source, text, tmp_path):
    arguments = {**INT4, "validate": False}
    quantize_directory(source, calibrate=text, output=tmp_path / "careful", rounding="gptq", **HOW, **arguments)
    fewbits.quantize(source, output=tmp_path / "plain", **arguments)
    data = torch.cat(load_directory(source).windows(text, samples=30, sequence=16))
    logits = {}
    for name in ("careful", "plain", "float"):
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        if name != "float":
            fewbits.load(tmp_path / name, into=model)
        with torch.no_grad():
            logits[name] = model(data).logits
    errors = {name: float((logits[name] - logits["float"]).square().mean()) for name in ("careful", "plain")}
    assert errors["careful"] < 0.9 * errors["plain"]


def test_a_rounding_without_data_works_for_every_source(cli, source, tmp_path):
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    for given in (source, tmp_path / "in.safetensors"):
        out = tmp_path / f"out-{given.name}"
        assert cli("quantize", given, "-o", out, "--scheme", "int4", "--rounding", "scale-search")[0] == 0
        printed = cli("inspect", out, "--json")[1]
        assert "codes by ScaleSearch" in printed


def test_scales_have_the_dtype_that_the_command_line_asks_for(cli, source, tmp_path):
    asked = ["quantize", source, "-o", tmp_path / "out", "--scheme", "int4", "--scale-dtype", "float16"]
    assert cli(*asked)[0] == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("_scale")} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rounding qronos", "--calibrate"),
        ("--samples 4", "--samples needs --calibrate TEXT"),
        ("--sequence 4", "--sequence needs --calibrate TEXT"),
        ("--tune 1", "--tune needs --calibrate TEXT"),
        ("--spill .", "--spill needs --calibrate TEXT"),
        ("--limit kl=1", "--limit needs --evaluate TEXT"),
        ("--evaluation-samples 4", "--evaluation-samples needs --evaluate TEXT"),
        ("--evaluate nowhere.txt --no-validate", "--evaluate is part of the validation, which --no-validate turns off"),
        ("--evaluate nowhere.txt --limit kl", "--limit kl: write METRIC=FIGURE"),
        ("--evaluate nowhere.txt --limit kll=1", "there is no metric 'kll'"),
        ("--evaluate nowhere.txt --limit kl=nan", "the limit of kl must be a number"),
        ("--evaluate nowhere.txt --sequence 8", "nowhere.txt cannot be read: No such file"),
        ("--evaluate self", "evaluation needs text from elsewhere"),
        ("--evaluate pyproject.toml --calibrate pyproject.toml --rounding gptq", "is calibration text too"),
        ("--calibrate nowhere.txt --rounding gptq --sequence 8", "nowhere.txt cannot be read: No such file"),
        ("--calibrate self", "that looks at data: --rounding importance-search or gptq or qronos; or --tune"),
        ("--calibrate self --rounding scale-search", "needs a strategy that looks at data"),
        ("--calibrate self --rounding gptq --sequence 65", "the model takes at most 64 tokens"),
        ("--calibrate self --rounding gptq --sequence 7", "sequence must be an integer from 8 up, not 7"),
        ("--calibrate self --rounding gptq --samples 0", "samples must be an integer from 1 up, not 0"),
        ("--calibrate self --rounding gptq --tune 0", "'--tune': 0 is not in the range x>=1"),
        ("--calibrate self --rounding gptq --samples 2 --sequence 8 --spill nowhere", "cannot spill activations to"),
    ],
)
def test_options_that_do_not_fit_are_refused(cli, source, tmp_path, options, message):
    code, _, err = cli("quantize", source, "-o", tmp_path / "out", "--scheme", "int4", "-q", *options.split())
    assert code == 2
    assert message in err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_refused_before_the_model_writes_its_text(cli, source, tmp_path):
    (tmp_path / "file").touch()
    command = ["quantize", source, "-o", tmp_path, *COMMAND, "--rounding", "gptq", "--calibrate", "self", "--json"]
    code, _, err = cli(*command)
    assert code == 2
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["error"]
    assert "exists; pass --replace" in err


def test_a_dry_run_plans_a_calibrated_directory(cli, source, text, tmp_path):
    options = ["--rounding", "qronos", "--calibrate", text, "--dry-run", "--json"]
    code, printed, err = cli("quantize", source, "-o", tmp_path / "out", *COMMAND, *options)
    assert code == 0, err
    assert "codes by Qronos" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calibrate nowhere.txt", "nowhere.txt cannot be read: No such file"),
        ("--calibrate self --sequence 65", "the model takes at most 64 tokens"),
        ("--evaluate nowhere.txt", "nowhere.txt cannot be read: No such file"),
    ],
)
def test_a_dry_run_checks_the_text(cli, source, options, message):
    command = ["quantize", source, "--dry-run", "--scheme", "int4", "--sequence", "8"]
    code, _, err = cli(*command, *(["--rounding", "gptq"] if "--calibrate" in options else []), *options.split())
    assert code == 2
    assert message in err.replace("\n", " ")


def test_the_text_is_cut_into_windows_spread_over_all_of_it(events):
    windows = cut_windows(range(100), 4, 10)
    assert [window[0] for window in windows] == [0, 30, 60, 90]
    assert {len(window) for window in windows} == {10}
    assert events == []
    assert [[*window] for window in cut_windows(range(25), 4, 10)] == [[*range(10)], [*range(15, 25)]]
    assert [(event["event"], event["tokens"], event["needed"], event["windows"]) for event in events] == [
        ("little_text", 25, 40, 2)
    ]
    with pytest.raises(CalibrationError, match="has 9 tokens; one window needs 10, and all 4 need 40"):
        cut_windows(range(9), 4, 10)


def test_a_directory_of_text_is_read_in_sorted_order_without_files_that_are_not_text(tmp_path, events):
    for name, content in [("b.md", b"second"), ("a/z.txt", b"first"), ("c.bin", b"\xff\xfe\x00"), (".git/x", b"no")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path) == ["first", "second"]
    assert [(event["event"], event["files"]) for event in events] == [("not_text", [str(tmp_path / "c.bin")])]
    with pytest.raises(ArgumentError, match=r"c\.bin is not UTF-8 text"):
        read_texts(tmp_path / "c.bin")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ArgumentError, match="has no text in UTF-8"):
        read_texts(tmp_path / "empty.txt")


def test_texts_end_with_the_token_that_ends_a_text(source, tmp_path):
    for number in range(3):
        write_words(tmp_path / f"{number}.txt", 15, seed=number)
    windows = load_directory(source).windows(tmp_path, samples=3, sequence=16)
    assert [int(window[0, -1]) for window in windows] == [2, 2, 2]
    assert all(window.shape == (1, 16) for window in windows)


def test_a_model_writes_the_same_text_each_time_and_starts_with_tokens_that_are_not_special(source):
    loaded = load_directory(source)
    first, again = (loaded.windows("self", samples=40, sequence=12) for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert torch.cat(first).shape == (40, 12)
    starts = {int(window[0, 0]) for window in first}
    assert starts.isdisjoint({0, 1, 2})
    assert len(starts) > 20


def test_written_tokens_follow_the_distribution_of_the_model(source):
    loaded = load_directory(source)
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()  # the bias alone decides
        bias = torch.full((112,), -100.0)
        bias[[5, 7]] = torch.tensor([3.0, 1.0]).log()
        loaded.model.lm_head.bias = nn.Parameter(bias)
    following = torch.cat(loaded.windows("self", samples=64, sequence=32))[:, 1:]
    assert set(following.unique().tolist()) == {5, 7}
    assert 0.7 < (following == 5).float().mean() < 0.8


def test_the_model_calibrates_itself_from_the_command_line(cli, source, tmp_path):
    command = ["quantize", source, "-o", tmp_path / "out", *COMMAND, "--rounding", "gptq", "--calibrate", "self"]
    code, _, err = cli(*command, "--tune", 1, "--json")
    assert code == 0, err
    steps = [json.loads(line) for line in err.splitlines()]
    assert "tune" in {step.get("activity") for step in steps}
    written = [step for step in steps if step.get("activity") == "generate"]
    assert {(step["unit"], step["total"], step["bytes_per_second"]) for step in written} == {("tokens", 96, None)}
    assert cli("verify", tmp_path / "out", "--against", source)[0] == 0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a tiny Bert, which is no causal language model."""
    folder = tmp_path_factory.mktemp("bert") / "source"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(folder)
    write_tokenizer(folder, sep_token="</s>", cls_token="<s>")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 1))
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_windows_of_an_encoder_have_special_tokens_at_both_ends(encoder, text, tmp_path):
    windows = load_directory(encoder).windows(text, **HOW)
    assert {(int(window[0, 0]), int(window[0, -1]), window.shape[1]) for window in windows} == {(1, 2, 16)}
    result = quantize_directory(encoder, calibrate=text, output=tmp_path / "out", rounding="gptq", **HOW, **INT4)
    assert result.report.ok
    with pytest.raises(CalibrationError, match="BertModel is not a causal language model"):
        load_directory(encoder).windows("self", **HOW)


def test_a_directory_whose_model_fuses_its_tensors_is_refused_with_their_names(text, tmp_path):
    experts = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**experts)).save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    with pytest.raises(MismatchError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight, .*exclude these"):
        quantize_directory(tmp_path / "in", calibrate=text, output=tmp_path / "out", rounding="gptq", **HOW, **INT4)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_lacks_weights_is_refused(source, text, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"lacks model\.norm\.weight of LlamaForCausalLM"):
        load_directory(folder)


def test_what_transformers_cannot_load_is_named(source, tmp_path):
    with pytest.raises(ArgumentError, match="is not a directory; text needs the directory"):
        load_directory(source / "model.safetensors")
    with pytest.raises(ArgumentError, match="transformers cannot load"):
        load_directory(tmp_path)


def test_an_error_names_the_extra_that_brings_transformers(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArgumentError, match=r"calibration needs transformers: pip install 'fewbits\[transformers\]'"):
        load_directory(source)


def test_a_weight_is_found_by_its_values_whatever_its_name(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    save_file({"b": model[0].weight.detach(), "a": model[2].weight.detach()}, tmp_path / "in.safetensors")
    data = [torch.randn(80, 32)]
    arguments = {"group_size": 32, "rounding": "gptq", "min_elements": 1, "data": data}
    fewbits.quantize(tmp_path / "in.safetensors", "int4", model=model, output=tmp_path / "out", **arguments)
    expected = fewbits.quantize(model, "int4", **arguments).model
    found = fewbits.load(tmp_path / "out")
    assert torch.equal(found["b"].dequantize(), expected[0].weight)
    assert torch.equal(found["a"].dequantize(), expected[2].weight)


# Evaluation.


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "words.txt"
    write_words(path, 400, seed=1)
    return path


EVALUATE = ["--evaluation-samples", "5"]


def test_the_command_line_compares_a_directory_with_its_model(cli, source, text, other_text, tmp_path):
    out, options = tmp_path / "out", ["--rounding", "gptq", "--calibrate", text, "--evaluate", other_text, *EVALUATE]
    code, printed, err = cli("quantize", source, "-o", out, *COMMAND, *options, "--limit", "kl=5", "--json")
    assert code == 0, err
    steps = [json.loads(line) for line in err.splitlines()]
    activities = list(dict.fromkeys(step["activity"] for step in steps if step["event"] == "progress"))
    assert activities == ["observe", "calibrate", "compare", "convert", "validate"]
    found = json.loads(printed)["report"]["model"]
    assert (found["batches"], found["positions"]) == (5, 80)
    assert found["kl"] > 0
    assert {"top1", "perplexity", "float_perplexity", "worst_kl"} <= found.keys()
    held = json.loads(cli("inspect", out, "--json")[1])["model_metrics"]
    assert held["kl"] == pytest.approx(found["kl"], rel=1e-5)
    fewbits.load(out, into=(model := transformers.AutoModelForCausalLM.from_pretrained(source)))
    data = load_directory(source).windows(other_text, 5, 16)
    expected = fewbits.extend.compare_outputs(transformers.AutoModelForCausalLM.from_pretrained(source), model, data)
    assert found["kl"] == pytest.approx(expected.figures["kl"], rel=1e-2)


def test_a_broken_limit_fails_the_command_and_the_directory_stays(cli, source, other_text, tmp_path):
    options = ["--scheme", "int4", "--sequence", "16", "--evaluate", other_text, *EVALUATE, "--limit", "kl=0"]
    code, printed, err = cli("quantize", source, "-o", tmp_path / "out", *options, "--min-elements", 0, "-q")
    assert code == 1, err
    assert "of the model is above 0 nats" in printed
    assert "model: KL" in printed
    assert "written, though it failed" in printed
    assert cli("verify", tmp_path / "out", "--against", source)[0] == 0


def test_a_rounding_without_data_is_tuned_and_compared_from_the_command_line(cli, source, text, other_text, tmp_path):
    options = ["--calibrate", text, "--tune", 1, "--evaluate", other_text, *EVALUATE]
    code, printed, err = cli("quantize", source, "-o", tmp_path / "out", *COMMAND, *options, "--json")
    assert code == 0, err
    assert json.loads(printed)["report"]["model"]["kl"] > 0


def test_an_encoder_is_compared_by_its_states(encoder, text, tmp_path):
    result = quantize_directory(
        encoder, evaluate=text, sequence=16, evaluation_samples=5, output=tmp_path / "a", **INT4
    )
    assert result.report.model.figures.keys() == {"cosine", "sqnr"}


def test_text_for_calibration_and_text_for_evaluation_are_kept_apart(source, text, other_text, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "copy.txt").write_bytes(text.read_bytes())
    (tmp_path / "link.txt").symlink_to(text)
    given = {"output": tmp_path / "out", "rounding": "gptq", **HOW, **INT4}
    for calibrate, evaluate in [(text, tmp_path / "link.txt"), (tmp_path / "texts", tmp_path / "texts" / "copy.txt")]:
        with pytest.raises(ArgumentError, match="is calibration text too"):
            quantize_directory(source, calibrate=calibrate, evaluate=evaluate, **given)
    with pytest.raises(ArgumentError, match=r"evaluation text: window 1 shares a run of 16 tokens"):
        quantize_directory(source, calibrate=text, evaluate=tmp_path / "texts", **given)
    with pytest.raises(ArgumentError, match="evaluation needs text from elsewhere, not 'self'"):
        quantize_directory(source, calibrate="self", evaluate="self", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "shared", "refused"), [(64, 32, True), (64, 31, False), (16, 16, True), (16, 15, False)]
)
def test_windows_overlap_if_they_share_a_run_of_half_a_window(size, shared, refused):
    first, second = torch.arange(size)[None], torch.arange(1000, 1000 + size)[None]
    second[0, :shared] = first[0, size - shared :]
    with pytest.raises(ArgumentError, match="window 2 shares") if refused else nullcontext():
        refuse_overlap([first], [torch.full((1, size), 7), second])
