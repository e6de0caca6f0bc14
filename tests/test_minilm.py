"""The real model: all-MiniLM-L6-v2, from its checkpoint to the embeddings of 200 sentences."""

import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

import fewbits
from fewbits.numerics.metrics import pooled_sqnr_db
from fewbits.sources.open import open_source
from fewbits.validation.verify import verify
from support.checkpoints import split

transformers = pytest.importorskip("transformers")

SCHEMES = ["int8", "int4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, minilm_path):
    """The checkpoint in int8 and int4: {scheme: (path, result)}."""
    folder = tmp_path_factory.mktemp("minilm")
    return {
        scheme: (folder / scheme, fewbits.quantize(minilm_path, scheme, output=folder / scheme)) for scheme in SCHEMES
    }


@pytest.fixture(scope="module")
def config(minilm_path):
    return transformers.BertConfig.from_json_file(minilm_path.parent / "config.json")


@pytest.fixture(scope="module")
def float_model(minilm_path, config):
    model = transformers.BertModel(config).eval()
    model.load_state_dict(safetensors.torch.load_file(minilm_path), strict=False)
    return model


@pytest.fixture(scope="module")
def tokens(minilm_path, sentences):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(minilm_path.parent / "tokenizer.json"), pad_token="[PAD]"
    )
    return tokenizer(list(sentences), padding=True, truncation=True, max_length=64, return_tensors="pt")


def embeddings(model, tokens):
    with torch.no_grad():
        states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


@pytest.fixture(scope="module")
def float_embeddings(float_model, tokens):
    return embeddings(float_model, tokens)


def is_encoder_matrix(name):
    return name.endswith(".weight") and "LayerNorm" not in name and name.startswith(("encoder.", "pooler."))


def pooled(report):
    measured = [tensor.measurement for tensor in report.tensors if is_encoder_matrix(tensor.name)]
    assert len(measured) == 37
    return pooled_sqnr_db(measured)


def test_int8_reaches_its_expected_sqnr(files):
    assert pooled(files["int8"][1].report) == pytest.approx(40.05, abs=0.1)


def test_int4_reaches_its_expected_sqnr(files):
    assert pooled(files["int4"][1].report) >= 17.85


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_has_the_size_in_the_ledger(files, scheme):
    path, result = files[scheme]
    assert len(split(path.read_bytes())[1]) == result.ledger.bytes_after


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_passes_verify_against_the_checkpoint(files, minilm_path, scheme):
    report = verify(files[scheme][0], open_source(minilm_path))
    assert report.ok, report.summary()
    assert all(tensor.measurement.broken_at is None for tensor in report.tensors if tensor.measurement)


def test_one_flipped_bit_is_found_and_named(files, tmp_path, config):
    name = "encoder.layer.3.attention.self.query.weight"
    data = bytearray(files["int8"][0].read_bytes())
    header, payload = split(bytes(data))
    data[len(data) - len(payload) + header[f"{name}_packed"]["data_offsets"][0] + 1000] ^= 4
    (tmp_path / "damaged").write_bytes(data)
    assert [tensor.name for tensor in verify(tmp_path / "damaged").tensors if tensor.failures] == [name]
    with pytest.raises(fewbits.errors.DigestError, match=f"{name}_packed"):
        fewbits.load(tmp_path / "damaged", into=transformers.BertModel(config))


def assert_close_enough(scheme, cosines, count):
    print(f"{scheme}: least cosine {cosines.min():.5f}, mean {cosines.mean():.5f}")
    assert len(cosines) == count
    least, mean = {"int8": (0.998, 0.999), "int4": (0.8, 0.93)}[scheme]
    assert cosines.min() > least
    assert cosines.mean() > mean
    if scheme == "int8":
        # Per-row int8 moves two sentences beyond this; groups of 128 do not (see below).
        assert (cosines > 0.999).sum() >= count - 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sentence_embeddings_stay_close(files, config, tokens, float_embeddings, scheme):
    model = fewbits.load(files[scheme][0], into=transformers.BertModel(config).eval())
    assert_close_enough(scheme, F.cosine_similarity(embeddings(model, tokens), float_embeddings), count=200)


class Int8Grouped(fewbits.Quantizer):
    """8 bits per weight, groups of 128."""

    spec = fewbits.QuantSpec(bits=8, granularity="group", group_size=128)


def test_eight_bits_in_groups_keep_every_sentence(tokens, float_model, float_embeddings):
    model = fewbits.quantize(float_model, Int8Grouped(), validate=False).model
    cosines = F.cosine_similarity(embeddings(model, tokens), float_embeddings)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_on_the_meta_device_is_filled_completely(
    tmp_path, config, tokens, float_model, float_embeddings, scheme
):
    few = {name: tokens[name][:20] for name in ("input_ids", "attention_mask")}
    result = fewbits.quantize(float_model, scheme, validate=False)
    result.save(tmp_path / "f")
    with torch.device("meta"):
        bare = transformers.BertModel(config).eval()
    model = fewbits.load(tmp_path / "f", into=bare)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    found = embeddings(model, few)
    assert torch.equal(found, embeddings(result.model, few))
    assert_close_enough(scheme, F.cosine_similarity(found, float_embeddings[:20]), count=20)


def test_the_file_of_the_model_and_of_the_checkpoint_hold_the_same_codes(files, tmp_path, float_model):
    fewbits.quantize(float_model, "int8", validate=False).save(tmp_path / "f")
    of_model, of_path = fewbits.load(tmp_path / "f"), fewbits.load(files["int8"][0])
    matrices = [name for name in of_path if is_encoder_matrix(name)]
    assert len(matrices) == 37
    assert all(of_model[name].equal(of_path[name]) for name in matrices)


def test_every_tensor_of_the_checkpoint_is_in_the_ledger(files, minilm_path):
    with safetensors.safe_open(minilm_path, "pt") as file:
        assert {row.name for row in files["int8"][1].ledger} == set(file.keys())


def test_a_model_of_another_size_is_refused(files, config):
    small = transformers.BertConfig(**{**config.to_dict(), "num_hidden_layers": 5})
    with pytest.raises(fewbits.errors.MismatchError, match=r"encoder\.layer\.5"):
        fewbits.load(files["int8"][0], into=transformers.BertModel(small))


def nearest(embeddings):
    """The nearest other sentence for each sentence."""
    directions = F.normalize(embeddings, dim=1)
    return (directions @ directions.T).fill_diagonal_(-1).argmax(1)


def test_int8_finds_the_nearest_sentence(files, config, tokens, float_embeddings):
    model = fewbits.load(files["int8"][0], into=transformers.BertModel(config).eval())
    same = nearest(embeddings(model, tokens)) == nearest(float_embeddings)
    print(f"nearest neighbour as in the float model: {int(same.sum())} of {len(same)}")
    assert same.float().mean() >= 0.98
