"""Results of `fewbits quantize DIR` load into their transformers class, whatever transformers renames or merges.

The models and the way through files are those of the stress program, which takes all types.
"""

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.errors import MismatchError

transformers = pytest.importorskip("transformers")
transformers_types = pytest.importorskip("stress.transformers_types")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

#: Types whose files have other names than their modules. The first ones differ most: renamed layers, merged experts,
#: split and permuted projections, models inside of models.
TYPES = (Path(__file__).parents[1] / "data" / "transformers_types.txt").read_text().split()
QUICK, ALL = TYPES[:10], TYPES[10:]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALL)])
def test_a_result_from_disk_loads_into_its_class_with_the_values_that_transformers_gives(kind, tmp_path):
    assert transformers_types.through_files(kind, tmp_path) == "loads under other names"


def experts_directory(path, **settings):
    """Quantize the directory of a tiny Mixtral; return a new model and the result."""
    transformers_types.build("mixtral").save_pretrained(path / "float")
    fewbits.quantize(path / "float", "int8", output=path / "result", validate=False, **settings)
    return transformers_types.build("mixtral"), path / "result"


def test_experts_of_different_schemes_are_dequantized_with_a_warning(tmp_path, events):
    model, result = experts_directory(tmp_path, overrides={"*experts.1.w1*": {"bits": 4}})
    loaded = fewbits.load(result, into=model)
    warnings = [event for event in events if event["event"] == "dequantized_to_load"]
    assert [name.rpartition(".")[2] for name in warnings[0]["tensors"]] == ["gate_up_proj"] * 2
    experts = loaded.model.layers[0].mlp.experts
    assert isinstance(experts._parameters["gate_up_proj"], torch.nn.Parameter)
    first = fewbits.load(result, dequantize=True)["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert torch.equal(experts.gate_up_proj[1, : len(first)], first)


def test_the_error_for_another_number_of_experts_names_both_shapes(tmp_path):
    model, result = experts_directory(tmp_path)
    model.config.num_local_experts = 3
    smaller = type(model)(model.config)
    with pytest.raises(MismatchError, match=r"experts\.down_proj has shape \(4, .* in the file, \(3, .* in the model"):
        fewbits.load(result, into=smaller)


def test_a_checkpoint_of_a_head_loads_into_the_base_model_without_it(tmp_path):
    transformers_types.build("gpt_neox").save_pretrained(tmp_path / "float")
    fewbits.quantize(tmp_path / "float", "int8", output=tmp_path / "result", validate=False)
    head = transformers_types.build("gpt_neox")
    base = transformers.AutoModel.from_config(head.config)
    loaded = fewbits.load(tmp_path / "result", into=base, ignore=["embed_out.weight"])
    expected = fewbits.load(tmp_path / "result", into=head)
    weight = fewbits.dequantize(expected).get_input_embeddings().weight
    assert torch.equal(fewbits.dequantize(loaded).get_input_embeddings().weight, weight)


def test_a_result_made_from_a_model_keeps_the_names_of_the_model(tmp_path):
    source = transformers_types.build("vit")
    fewbits.quantize(source, "int8", validate=False).save(tmp_path / "model.safetensors")
    loaded = fewbits.load(tmp_path / "model.safetensors", into=transformers_types.build("vit"))
    expected = fewbits.dequantize(fewbits.quantize(source, "int8", validate=False).model).state_dict()
    assert not list(transformers_types.differences(loaded, expected))
