"""How one batch reaches a model's forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.nn.walk import feed


class Named(nn.Module):
    """Returns its arguments by name, as the other classes here."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class OneMapping(nn.Module):
    """As `SentenceTransformer`: the features are the first argument."""

    def forward(self, input: dict[str, Tensor], **kwargs: Any) -> Any:
        return {"input": input, **kwargs}


class AnyKeywords(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"args": args, **kwargs}


IDS = torch.arange(3)
FEATURES = {"input_ids": IDS, "attention_mask": torch.ones(3)}


def test_a_mapping_is_passed_as_keyword_arguments() -> None:
    assert feed(Named(), FEATURES) == FEATURES
    assert feed(AnyKeywords(), FEATURES) == {"args": (), **FEATURES}


def test_a_mapping_is_passed_as_one_argument_if_the_signature_asks_for_it() -> None:
    assert feed(OneMapping(), FEATURES)["input"] == FEATURES
    assert feed(nn.Sequential(nn.Identity()), FEATURES) == FEATURES


class Writing(nn.Module):
    """As `SentenceTransformer`: it adds its outputs to the features."""

    def forward(self, input: dict[str, Tensor]) -> dict[str, Tensor]:
        input["output"] = input["attention_mask"] + 1
        return input


def test_a_forward_that_writes_into_its_mapping_leaves_the_batch_as_it_is() -> None:
    before = dict(FEATURES)
    assert "output" in feed(Writing(), FEATURES)
    assert FEATURES.keys() == before.keys()


def test_a_mapping_with_the_name_of_the_only_parameter_is_a_keyword_argument() -> None:
    assert feed(OneMapping(), {"input": FEATURES}) == {"input": FEATURES}


def test_a_misspelt_key_beside_a_right_one_is_named() -> None:
    with pytest.raises(TypeError, match="attention_musk"):
        feed(Named(), {"input_ids": IDS, "attention_musk": IDS})


def test_a_tuple_is_all_positional_arguments_and_a_tensor_is_one() -> None:
    assert feed(Named(), (IDS, IDS)) == {"input_ids": IDS, "attention_mask": IDS}
    assert feed(Named(), IDS) == {"input_ids": IDS, "attention_mask": None}


def test_a_forward_without_a_signature_gets_keyword_arguments() -> None:
    model = nn.Identity()
    model.forward = torch.add  # type: ignore[assignment]
    assert feed(model, {"input": IDS, "other": IDS}).equal(2 * IDS)
