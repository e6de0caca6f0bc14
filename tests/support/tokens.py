"""A tokenizer of a hundred words, for tiny models of transformers."""

from pathlib import Path

import tokenizers
import transformers

WORDS = [f"word{number}" for number in range(96)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_tokenizer(folder: Path, **special: str) -> None:
    """Write a tokenizer that knows `WORDS` and `SPECIAL`; `special` names its special tokens, such as eos_token."""
    model = tokenizers.models.WordLevel({word: at for at, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special).save_pretrained(folder)
