"""A word-level tokenizer made on the spot: no file, no network, every word one token."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.models import VOCABULARY

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
"""In the order of their ids; 1 is padding and 2 the end of a text, as in `models.SPECIAL`."""

SUBJECTS = ("film", "plot", "cast", "score")
VERDICTS = ("good", "bad")


def words() -> list[str]:
    """Every word the tokenizer knows beside the special tokens."""
    named = ["the", "was", "verdict", ":", *SUBJECTS, *VERDICTS]
    return named + [f"w{i}" for i in range(VOCABULARY - len(SPECIAL) - len(named))]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the tiny models have, ends a text with nothing (the trainers add `</s>` themselves)."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)
