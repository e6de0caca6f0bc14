"""Calibrate and evaluate directories of Hugging Face transformers, with text or with what the model itself writes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fewbits.api import Result, quantize
from fewbits.errors import ArgumentError, CalibrationError
from fewbits.integrations.text import cut_windows, read_texts, refuse_overlap, refuse_same_files
from fewbits.integrations.writing import write
from fewbits.selection.progress import Progress, Step, no_progress

#: The model writes the calibration text itself.
SELF = "self"

#: How many windows for calibration, how many for evaluation, and how many tokens in each.
SAMPLES, EVALUATION_SAMPLES, SEQUENCE = 128, 32, 512

#: Windows that the model writes at a time. Each has a cache of keys and values for all of its tokens.
_AT_A_TIME = 32


def quantize_directory(
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    calibrate: str | os.PathLike[str] | None = None,
    evaluate: str | os.PathLike[str] | None = None,
    samples: int = SAMPLES,
    evaluation_samples: int = EVALUATION_SAMPLES,
    sequence: int = SEQUENCE,
    **arguments: Any,
) -> Result:
    """Quantize the directory of a transformers model with text: to calibrate, to tune, or to evaluate the result.

    The result is a directory like that of `fewbits.quantize`. The model is loaded in float32, from local files, without
    code of the directory.

    Args:
        path: the directory, with ``config.json``, weights and a tokenizer.
        scheme: as in `fewbits.quantize`.
        calibrate: a text file, a directory of text files, or ``"self"``: a causal language model writes the text. None
            gives no data to the rounding strategy.
        evaluate: a text file, or a directory of text files, on which the result is compared with the model; text that
            is not calibration text. None does not compare.
        samples: the number of windows of text for calibration.
        evaluation_samples: the number of windows of text for evaluation.
        sequence: the number of tokens in each window.
        arguments: other arguments of `fewbits.quantize`: `output`, `rounding`, `progress`, settings, and so on.

    Raises:
        ArgumentError: if transformers is not installed, the directory cannot be loaded, the text cannot be read, or
            text for evaluation is also used for calibration.
        CalibrationError: if there is too little text, or the model cannot write any.
        FewbitsError: the errors of `fewbits.quantize`.
    """
    windows = Windows(calibrate, evaluate, samples, evaluation_samples, sequence)
    given = windows.arguments(load_directory(path), arguments.get("progress", no_progress))
    return quantize(path, scheme, **{**given, **arguments})


def load_directory(path: str | os.PathLike[str]) -> LoadedDirectory:
    """Load the model and the tokenizer of a transformers directory.

    Raises:
        ArgumentError: if transformers is not installed, or the directory cannot be loaded.
    """
    transformers = _transformers()
    if not Path(path).is_dir():
        raise ArgumentError(f"{path} is not a directory; text needs the directory of a transformers model")
    local = {"local_files_only": True, "trust_remote_code": False}
    with _without_bars(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(path, **local)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
            model, found = _model_class(transformers, config).from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ArgumentError(f"transformers cannot load {path}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ArgumentError(
            f"{path} lacks {', '.join(missing)} of {type(model).__name__}; calibration would run with random weights"
        )
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return LoadedDirectory(model.eval(), tokenizer, is_causal=type(model).__name__ in set(causal))


@attrs.frozen(eq=False)
class LoadedDirectory:
    """The contents of a transformers directory.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        is_causal: whether it is a causal language model.
    """

    model: nn.Module
    tokenizer: Any
    is_causal: bool

    def windows(
        self,
        calibrate: str | os.PathLike[str],
        samples: int = SAMPLES,
        sequence: int = SEQUENCE,
        progress: Progress = no_progress,
    ) -> list[Tensor]:
        """Make calibration data.

        Args:
            calibrate: a text file, a directory of text files, or ``"self"``.
            samples: the number of windows.
            sequence: the number of tokens in each.
            progress: called while the model writes.

        Returns:
            batches of one window each, (1, sequence).

        Raises:
            ArgumentError: if a number is too small or too large, or the text cannot be read.
            CalibrationError: if there is too little text, or the model cannot write any.
        """
        if calibrate == SELF:
            self.check_writing(samples, sequence)
            return self._written(samples, sequence, progress)
        self._check(samples, sequence)
        before, after = ([], []) if self.is_causal else self._ends()
        cut = cut_windows(self._tokens(read_texts(calibrate)), samples, sequence - len(before) - len(after))
        return [torch.tensor([[*before, *window, *after]]) for window in cut]

    def check_writing(self, samples: int, sequence: int) -> None:
        """Refuse a model that cannot write so many windows.

        Raises:
            ArgumentError: if a number is too small or too large.
            CalibrationError: if it is no causal language model.
        """
        self._check(samples, sequence)
        if not self.is_causal:
            raise CalibrationError(
                f"{type(self.model).__name__} is not a causal language model, and cannot write calibration text; give "
                "a text file or a directory of text files"
            )

    def _check(self, samples: int, sequence: int) -> None:
        for name, value, least in (("samples", samples, 1), ("sequence", sequence, 8)):
            if type(value) is not int or value < least:
                raise ArgumentError(f"{name} must be an integer from {least} up, not {value!r}")
        longest = getattr(self._config, "max_position_embeddings", None)
        if isinstance(longest, int) and sequence > longest:
            raise ArgumentError(f"sequence is {sequence:,}, and the model takes at most {longest:,} tokens")

    @property
    def _config(self) -> Any:
        config: Any = self.model.config
        return config.get_text_config()

    def _ends(self) -> tuple[list[int], list[int]]:
        """Return the special tokens before and after a text."""
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), None)
        if at is None:
            raise CalibrationError(
                f"{type(self.tokenizer).__name__} does not show its special tokens: it makes {alone} of 'a' without "
                f"them, and {whole} with them; make the batches yourself, and pass them to fewbits.quantize (data=)"
            )
        return whole[:at], whole[at + len(alone) :]

    def _tokens(self, texts: list[str]) -> list[int]:
        """Return the tokens of all texts, each followed by the token that ends a text, if there is one."""
        ends = [self.tokenizer.eos_token_id, self.tokenizer.sep_token_id]
        end = next((token for token in ends if token is not None), None)
        tokens: list[int] = []
        for text in texts:
            # "verbose" would warn of a text that is longer than the model takes, which is cut below.
            tokens += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += [] if end is None else [end]
        return tokens

    def _written(self, samples: int, sequence: int, progress: Progress) -> list[Tensor]:
        """Let the model write windows, each from a random first token that is not special."""
        special = set(self.tokenizer.all_special_ids)
        size = min(len(self.tokenizer), self._config.vocab_size)
        plain = torch.tensor([token for token in range(size) if token not in special])
        generator = torch.Generator().manual_seed(0)
        starts = plain[torch.randint(len(plain), (samples,), generator=generator)]
        windows: list[Tensor] = []
        for at in range(0, samples, _AT_A_TIME):
            first = starts[at : at + _AT_A_TIME]

            def report(tokens: int, before: int = at * sequence, texts: int = len(first)) -> None:
                progress(Step("generate", "calibration text", before + tokens * texts, samples * sequence))

            windows += [text[None] for text in write(self.model, first, sequence, generator, report)]
        return windows


@attrs.frozen
class Windows:
    """The text for a directory, and how to cut it.

    Attributes:
        calibrate: a text file, a directory of text files, or ``"self"``; None for no calibration.
        evaluate: a text file, or a directory of text files; None for no evaluation.
        samples: the number of windows for calibration.
        evaluation_samples: the number of windows for evaluation.
        sequence: the number of tokens in each window.

    Raises:
        ArgumentError: if a file is for both, or `evaluate` is ``"self"``.
    """

    calibrate: str | os.PathLike[str] | None = None
    evaluate: str | os.PathLike[str] | None = None
    samples: int = SAMPLES
    evaluation_samples: int = EVALUATION_SAMPLES
    sequence: int = SEQUENCE

    def __attrs_post_init__(self) -> None:
        if self.evaluate == SELF:
            raise ArgumentError(
                f"evaluation needs text from elsewhere, not {SELF!r}: what the model writes suits it too well"
            )
        if self.evaluate is not None and self.calibrate not in (None, SELF):
            refuse_same_files(self.calibrate, self.evaluate)

    def arguments(self, loaded: LoadedDirectory, progress: Progress = no_progress) -> dict[str, Any]:
        """Return arguments of `fewbits.quantize`: the model, its windows, and the metrics to compare by.

        Args:
            loaded: the directory.
            progress: called while the model writes.

        Raises:
            ArgumentError: as `LoadedDirectory.windows`, or if windows overlap.
            CalibrationError: as `LoadedDirectory.windows`.
        """
        given: dict[str, Any] = {"model": loaded.model, "samples": None}
        evaluation = []
        if self.evaluate is not None:
            evaluation = given["evaluate"] = loaded.windows(self.evaluate, self.evaluation_samples, self.sequence)
            given["metrics"] = ["kl", "top1", "perplexity"] if loaded.is_causal else None
        if self.calibrate is not None:
            given["data"] = loaded.windows(self.calibrate, self.samples, self.sequence, progress)
            refuse_overlap(given["data"], evaluation)
        return given

    def check(self, loaded: LoadedDirectory) -> None:
        """Refuse what `arguments` would refuse; the model writes no text for that."""
        if self.calibrate == SELF:
            loaded.check_writing(self.samples, self.sequence)
            attrs.evolve(self, calibrate=None).arguments(loaded)
        else:
            self.arguments(loaded)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ArgumentError(f"calibration needs {error.name}: pip install 'fewbits[transformers]'") from None


def _model_class(transformers: Any, config: Any) -> Any:
    """Return the class that the configuration names; AutoModel, if transformers has no such class."""
    names = getattr(config, "architectures", None) or []
    found = [getattr(transformers, name) for name in names[:1] if hasattr(transformers, name)]
    return found[0] if found else transformers.AutoModel


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """Turn off the progress bars of transformers."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
