"""`fewbits.allocate`: the least error under a budget, settings that `quantize` meets to the byte, and bad input."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fewbits
from fewbits.errors import ArgumentError, CalibrationError, CheckpointError, NonFiniteError, SelectionError
from fewbits.planning.candidates import DEFAULT_CANDIDATES, Candidate

CANDIDATES = [{"scheme": "int3", "group_size": 32}, {"scheme": "nf4", "group_size": 32}, "int8", "keep"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x))


class Model(nn.Module):
    """Embedding, blocks and a tied output layer, whose weights differ much in their spread."""

    def __init__(self, width=64, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        for number, weight in enumerate(p for p in self.parameters() if p.dim() == 2):
            weight.data.mul_(torch.randn(weight.shape).exp() * 0.5**number)

    def forward(self, input_ids):
        return {"logits": self.head(self.blocks(self.embed(input_ids)))}


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def tokens(batches=4):
    return [{"input_ids": torch.randint(0, 50, (2, 12))} for _ in range(batches)]


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.floats(3.9, 12))
def test_predicted_bytes_are_the_bytes_of_the_result_and_within_the_budget(seed, bits):
    source = model(seed)
    plan = fewbits.allocate(source, bits_per_weight=bits)
    assert plan.bits_per_weight <= bits
    result = fewbits.quantize(source, config=plan.config, fail_under=0.0)
    assert result.ledger == plan.ledger
    assert result.report.bytes_after == plan.ledger.bytes_after
    assert [one.bytes for one in plan.weights] == [plan.ledger[one.name].bytes_after for one in plan.weights]
    measured = {tensor.name: tensor.measurement for tensor in result.report.tensors}
    for one in plan.weights:
        if one.sqnr_db is not None:
            assert one.sqnr_db == pytest.approx(measured[one.name].sqnr_db, abs=1e-3)


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.sampled_from(CANDIDATES[:3]), st.booleans())
def test_no_uniform_scheme_of_that_size_has_less_error(seed, rule, with_data):
    source, data = model(seed), {"data": tokens()} if with_data else {}
    # With much room, all weights get the larger of two candidates.
    uniform = fewbits.allocate(source, target_size="1GB", candidates=[rule, "int2"], together=[], **data)
    size = uniform.ledger.bytes_after
    plan = fewbits.allocate(source, target_size=size, candidates=CANDIDATES, together=[], **data)
    assert plan.error <= uniform.error * (1 + 1e-9)


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.floats(4, 10))
def test_layers_that_servers_join_get_the_same_scheme(seed, bits):
    plan = fewbits.allocate(model(seed), bits_per_weight=bits)
    schemes = {one.name: one.scheme for one in plan.weights}
    for block in range(2):
        assert len({schemes[f"blocks.{block}.{part}_proj.weight"] for part in "qkv"}) == 1


def test_a_shared_weight_has_one_scheme():
    plan = fewbits.allocate(model(), bits_per_weight=5)
    assert [one.name for one in plan.weights].count("embed.weight") == 1
    assert plan.ledger["head.weight"].alias_of == "embed.weight"


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_saved_settings_read_back_as_they_are(tmp_path, suffix):
    plan = fewbits.allocate(model(), bits_per_weight=5)
    path = tmp_path / f"plan{suffix}"
    plan.save(path)
    assert fewbits.QuantizationConfig.from_file(path) == plan.config
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ArgumentError, match="exists"):
        plan.save(path)
    plan.save(path, replace=True)


@pytest.mark.parametrize("name", ["plan.txt", "missing/plan.toml"])
def test_settings_that_cannot_be_written_leave_nothing_behind(tmp_path, name):
    with pytest.raises((ArgumentError, CheckpointError), match=r"plan"):
        fewbits.allocate(model(), bits_per_weight=5).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


NAMES = ["a", "b.a", "b.a.a", "x*y", "quote'\"", "\x7f\t", "re:a", "dot.", "ünïcode"]


@settings(max_examples=8)
@given(st.permutations(NAMES), st.integers(0, 2**32))
def test_every_name_gets_its_own_scheme(names, seed):
    torch.manual_seed(seed)
    source = {name: torch.randn(8, 64) * torch.randn(8, 64).exp() for name in names}
    plan = fewbits.allocate(source, bits_per_weight=5)
    schemes = {one.name: one.scheme for one in plan.weights}
    assert set(schemes) == set(names)
    assert len(set(schemes.values())) > 1


def test_odd_names_survive_a_file(tmp_path):
    source = {name: torch.randn(8, 64) * 2.0**-i for i, name in enumerate(NAMES)}
    plan = fewbits.allocate(source, bits_per_weight=5)
    plan.save(tmp_path / "plan.toml")
    config = fewbits.QuantizationConfig.from_file(tmp_path / "plan.toml")
    assert fewbits.quantize(source, config=config, fail_under=0.0).ledger == plan.ledger


def test_a_file_and_a_state_dict_have_the_same_plan(tmp_path):
    source = {name: value for name, value in model().state_dict().items() if name != "head.weight"}
    save_file(source, tmp_path / "model.safetensors")
    plans = [fewbits.allocate(given, bits_per_weight=4.5) for given in (source, tmp_path / "model.safetensors")]
    assert plans[0].to_json() == plans[1].to_json()


def test_chunks_of_a_large_tensor_add_up(monkeypatch):
    source = {"large": torch.randn(300, 64), "small": torch.randn(16, 64)}
    whole = fewbits.allocate(source, bits_per_weight=4.5)
    monkeypatch.setattr("fewbits.planning.scoring.CHUNK_ELEMENTS", 64 * 64)
    assert fewbits.allocate(source, bits_per_weight=4.5).error == pytest.approx(whole.error, rel=1e-12)


def test_a_model_beside_a_file_predicts_as_the_model_itself(tmp_path):
    source, data = model(), tokens()
    save_file({n: v for n, v in source.state_dict().items() if n != "head.weight"}, tmp_path / "model.safetensors")
    beside = fewbits.allocate(tmp_path / "model.safetensors", bits_per_weight=4.5, model=source, data=data)
    alone = fewbits.allocate(source, bits_per_weight=4.5, data=data)
    assert beside.error == pytest.approx(alone.error, rel=1e-9)
    assert {w.name: w.scheme for w in beside.weights} == {w.name: w.scheme for w in alone.weights}


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.floats(1e-4, 1e-1))
def test_a_limit_of_kl_is_met_with_the_fewest_bytes(seed, limit):
    source, data = model(seed), tokens()
    plan = fewbits.allocate(source, max_kl=limit, data=data)
    assert plan.error <= limit
    if plan.ledger.bytes_after > plan.curve.points[0][0]:
        smaller = fewbits.allocate(source, target_size=plan.ledger.bytes_after - 1, data=data)
        assert smaller.error > limit


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.floats(12, 32))
def test_every_weight_has_the_least_sqnr(seed, least):
    plan = fewbits.allocate(model(seed), min_sqnr=least)
    assert all(one.sqnr_db is None or one.sqnr_db >= least for one in plan.weights)
    both = fewbits.allocate(model(seed), min_sqnr=least, bits_per_weight=plan.bits_per_weight + 2)
    assert all(one.sqnr_db is None or one.sqnr_db >= least for one in both.weights)


def test_rules_of_the_user_stay():
    config = fewbits.QuantizationConfig(exclude=["blocks.0"], overrides={"blocks.1.q_proj": "int8"})
    plan = fewbits.allocate(model(), bits_per_weight=24, config=config, together=[])
    assert plan.ledger["blocks.0.q_proj.weight"].fate == "kept"
    assert plan.ledger["blocks.1.q_proj.weight"].spec.bits == 8
    assert not {"blocks.0.q_proj.weight", "blocks.1.q_proj.weight"} & {one.name for one in plan.weights}


@pytest.mark.parametrize("rule", ["keep", "int8"])
def test_a_rule_for_embeddings_stays(rule):
    plan = fewbits.allocate(model(), bits_per_weight=24, config=fewbits.QuantizationConfig(embeddings=rule))
    assert "embed.weight" not in {one.name for one in plan.weights}
    assert plan.ledger["embed.weight"].fate == {"keep": "kept", "int8": "quantized"}[rule]


def test_a_rule_for_the_output_layer_fixes_the_shared_embedding():
    config = fewbits.QuantizationConfig(overrides={"head": "int8"})
    plan = fewbits.allocate(model(), bits_per_weight=24, config=config)
    assert "embed.weight" not in {one.name for one in plan.weights}
    assert plan.ledger["embed.weight"].spec.bits == 8


def test_casts_are_candidates_and_leave_vectors_alone():
    plan = fewbits.allocate(model(), min_sqnr=60, candidates=["int4", "fp16"])
    assert {one.scheme for one in plan.weights} == {"fp16"}
    assert plan.ledger["blocks.0.norm.weight"].fate == "kept"


def test_a_budget_below_the_tensors_without_a_choice_is_refused():
    with pytest.raises(ArgumentError, match="without a choice"):
        fewbits.allocate(model(), bits_per_weight=4, config=fewbits.QuantizationConfig(exclude=["blocks.0"]))


@settings(max_examples=8)
@given(st.integers(0, 2**32), st.booleans())
def test_the_curve_falls_and_is_convex(seed, with_data):
    curve = fewbits.allocate(model(seed), bits_per_weight=5, **({"data": tokens()} if with_data else {})).curve
    assert curve.named["chosen"] in curve.points
    assert curve.named["knee"] in curve.points
    on_hull = [point for point in curve.points if point != curve.named["chosen"]]
    sizes, errors = [size for size, _ in on_hull], [error for _, error in on_hull]
    assert all(a < b for a, b in pairwise(sizes))
    assert all(a >= b for a, b in pairwise(errors))
    slopes = [(a - b) / (n - m) for (a, b), (m, n) in zip(pairwise(errors), pairwise(sizes), strict=True)]
    assert all(b <= a * (1 + 1e-6) + 1e-15 for a, b in pairwise(slopes))
    drawing = ET.fromstring(curve.to_svg())
    assert drawing.get("role") == "img"
    assert len(drawing.findall("{*}circle")) >= 1


def test_the_plan_does_not_depend_on_the_number_of_threads():
    threads, plans = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            plans.append(fewbits.allocate(model(), bits_per_weight=4.5).to_json())
    finally:
        torch.set_num_threads(threads)
    assert plans[0] == plans[1]


def test_a_weight_that_no_output_depends_on_gets_the_curvature_of_the_others(caplog):
    source = model()
    source.unused = nn.Linear(64, 64)
    plan = fewbits.allocate(source, bits_per_weight=4.5, data=tokens())
    assert any(one.name == "unused.weight" and one.error > 0 for one in plan.weights)
    assert "weights_without_gradient" in caplog.text


def test_every_default_candidate_can_be_chosen():
    for rule in DEFAULT_CANDIDATES:
        if rule != "keep":
            plan = fewbits.allocate(model(), min_sqnr=0.1, candidates=[rule, "keep"])
            assert {one.scheme for one in plan.weights} == {Candidate.of(rule).label}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ArgumentError, "one budget"),
        ({"bits_per_weight": 4, "target_size": 100}, ArgumentError, "one budget"),
        ({"bits_per_weight": 0}, ArgumentError, "above 0"),
        ({"bits_per_weight": math.nan}, ArgumentError, "above 0"),
        ({"bits_per_weight": "4"}, ArgumentError, "above 0"),
        ({"target_size": "4 bits"}, ArgumentError, "target_size"),
        ({"bits_per_weight": 1}, ArgumentError, "raise the budget"),
        ({"bits_per_weight": 64}, ArgumentError, "nothing to quantize"),
        ({"max_kl": 0.1}, ArgumentError, "needs data"),
        ({"max_kl": 1e-30, "candidates": ["int2", "int3"], "data": []}, CalibrationError, "no batch"),
        ({"min_sqnr": 90, "candidates": ["int8", "nf4"]}, ArgumentError, "add 'int8' or 'keep'"),
        ({"bits_per_weight": 4, "candidates": "nf4"}, ArgumentError, "must be a list"),
        ({"bits_per_weight": 4, "candidates": ["nf5"]}, ArgumentError, "a candidate is"),
        ({"bits_per_weight": 4, "candidates": [{"scheme": "nf4", "groups": 3}]}, ArgumentError, "a candidate is"),
        ({"bits_per_weight": 4, "candidates": ["nf4", "nf4"]}, ArgumentError, "twice"),
        ({"bits_per_weight": 4, "candidates": ["keep"]}, ArgumentError, "at least one candidate with codes"),
        ({"bits_per_weight": 4, "candidates": [{"scheme": "int8", "group_size": 3}]}, ArgumentError, "group_size"),
        ({"bits_per_weight": 5, "together": ["q_proj"]}, SelectionError, "list of lists"),
        ({"bits_per_weight": 5, "together": [["q_proj", "qkv"]]}, SelectionError, "'qkv'"),
        ({"bits_per_weight": 5, "config": {"scheme": "int8"}}, ArgumentError, "QuantizationConfig"),
        ({"bits_per_weight": 5, "config": fewbits.QuantizationConfig(exclude=["nope"])}, SelectionError, "nope"),
    ],
)
def test_arguments_that_are_wrong_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        fewbits.allocate(model(), **arguments)


def test_data_needs_a_model_and_max_kl_needs_logits():
    with pytest.raises(ArgumentError, match="data needs a model"):
        fewbits.allocate(model().state_dict(), bits_per_weight=5, data=tokens())
    with pytest.raises(ArgumentError, match="logits"):
        fewbits.allocate(nn.Linear(64, 64), max_kl=0.1, data=[torch.randn(2, 64)])


def test_a_budget_of_kl_that_nothing_meets_is_refused():
    with pytest.raises(ArgumentError, match="most exact choice"):
        fewbits.allocate(model(), max_kl=1e-30, candidates=["int2", "int3"], data=tokens())


def test_a_weight_that_is_not_finite_is_named():
    source = model()
    source.blocks[1].v_proj.weight.data[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.v_proj\.weight"):
        fewbits.allocate(source, bits_per_weight=5)


def test_the_table_fits_its_width_and_has_every_weight():
    plan = fewbits.allocate(model(), bits_per_weight=4.5)
    table = plan.table(60)
    assert max(map(len, table.splitlines())) <= 60
    assert len(table.splitlines()) == len(plan.weights) + 2
    assert repr(plan).startswith("Allocation(")
