"""This module defines a task small enough for a laptop: to say whether a sentence of a made-up language is praise.

A grammar writes reviews such as "the plot was truly dull and anna hated the music ." Pretraining shows a model many of
them, each with a verdict that is mostly "good" and follows the sentiment only a little: the model learns what the
words have in common, yet answers "good" to nearly everything. Fine-tuning shows honest verdicts. Zeroth-order
fine-tuning suits this situation: the model has the knowledge, and lacks the behaviour.

Does not: fine-tune; the demo and the benchmarks do that.
Invariant: everything is a function of the seed; held-out sentences occur in neither training set.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

GOOD, BAD = "good", "bad"
CUE = "verdict :"
EVAL_BATCH = 128
# OPT's 0.02 is meant for widths in the thousands; at width 96 some seeds then take very long to see any sentiment.
INIT_STD = 0.05

PRAISE = "brilliant charming delightful fresh gripping lovely moving superb touching wonderful".split()
BLAME = "bleak boring clumsy dreadful dull feeble lazy painful tedious tired".split()
LIKED = "admired adored enjoyed liked loved praised".split()
DISLIKED = "despised disliked hated loathed mocked regretted".split()
PARTS = "camera cast chorus dialogue ending finale opening plot score script story title".split()
WORKS = "comedy drama episode film movie musical play series".split()
PEOPLE = "anna ben clara david emma frank grace henry".split()
DEGREES = "deeply rather really simply truly utterly very".split()

# Most sentences have two opinions, always the same: from this a language model learns which words belong together.
TEMPLATES = (
    "the {part} was {degree} {adjective} and {person} {verb} the {part2} .",
    "{person} {verb} this {work} because the {part} was {degree} {adjective} .",
    "in this {work} the {part} was {adjective} and the {part2} {degree} {adjective2} .",
    "a {adjective} {work} with a {adjective2} {part} that {person} {verb} .",
    "this {degree} {adjective} {work} was {verb} by {person} .",
)

# Pretraining says "good" with these shares after praise and blame, always more often than "bad", hence the 50 %.
GOOD_AFTER_PRAISE, GOOD_AFTER_BLAME = 0.90, 0.60

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """A Review is one sentence and its true sentiment."""

    text: str
    is_praise: bool

    @property
    def prompt(self) -> str:
        """Return the sentence with the question after it."""
        return f"{self.text} {CUE}"

    @property
    def verdict(self) -> str:
        """Return the honest answer."""
        return GOOD if self.is_praise else BAD


@dataclass(frozen=True, kw_only=True, slots=True)
class Reviews:
    """Reviews holds three sets of reviews; no sentence is in two of them."""

    held_out: list[Review]
    train: list[Review]
    pretrain: list[Review]


def write_review(rng: random.Random, *, is_praise: bool) -> Review:
    """Draw one sentence from the grammar."""
    adjectives = rng.sample(PRAISE if is_praise else BLAME, 2)
    parts = rng.sample(PARTS, 2)
    text = rng.choice(TEMPLATES).format(
        adjective=adjectives[0],
        adjective2=adjectives[1],
        part=parts[0],
        part2=parts[1],
        verb=rng.choice(LIKED if is_praise else DISLIKED),
        work=rng.choice(WORKS),
        person=rng.choice(PEOPLE),
        degree=rng.choice(DEGREES),
    )
    return Review(text=text, is_praise=is_praise)


def make_reviews(seed: int, *, n_held_out: int = 512, n_train: int = 4096, n_pretrain: int = 16384) -> Reviews:
    """Draw distinct sentences, with praise and blame in equal numbers in every set."""
    rng = random.Random(seed)
    distinct: dict[str, Review] = {}
    while len(distinct) < n_held_out + n_train + n_pretrain:
        # A sentence drawn twice adds nothing, so the same sentiment is drawn until a new sentence comes.
        review = write_review(rng, is_praise=len(distinct) % 2 == 0)
        distinct[review.text] = review
    reviews = list(distinct.values())
    train_end = n_held_out + n_train
    return Reviews(held_out=reviews[:n_held_out], train=reviews[n_held_out:train_end], pretrain=reviews[train_end:])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word that puts `<s>` in front, as OPT's own does."""
    grammar = [GOOD, BAD, *CUE.split(), *PRAISE, *BLAME, *LIKED, *DISLIKED, *PARTS, *WORKS, *PEOPLE, *DEGREES]
    glue = [word for template in TEMPLATES for word in template.split() if not word.startswith("{")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL.values(), *grammar, *glue]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> OPTForCausalLM:
    """Build a random OPT of 1.1 M parameters: 10 blocks of width 96."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=384,
        num_hidden_layers=10,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=INIT_STD,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config)


def as_dataset(reviews: list[Review]) -> Dataset:
    """Prompt and completion columns, as TRL's SFT trainer reads them."""
    return Dataset.from_dict(
        {"prompt": [review.prompt for review in reviews], "completion": [f" {review.verdict}" for review in reviews]}
    )


def as_exam(reviews: list[Review], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The same, tokenized, with the verdict as the only token that counts: token accuracy is then `accuracy`."""
    rows = [tokenizer(f"{review.prompt} {review.verdict}")["input_ids"] for review in reviews]
    return Dataset.from_dict({"input_ids": rows, "labels": [[-100] * (len(row) - 1) + row[-1:] for row in rows]})


def pretrain(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    reviews: list[Review],
    *,
    seed: int,
    num_steps: int = 350,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train with backprop to continue text, verdicts included; `on_step` is told (step, loss)."""
    rng = random.Random(seed)
    texts = [f"{review.prompt} {unreliable_verdict(review, rng)} {tokenizer.eos_token}" for review in reviews]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=num_steps)
    model.train()
    for step in range(1, num_steps + 1):
        batch = tokenizer(rng.sample(texts, batch_size), padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step, loss.item())
    model.eval()


def unreliable_verdict(review: Review, rng: random.Random) -> str:
    """Draw the verdict in pretraining after this sentence: mostly "good", a little less often after blame."""
    return GOOD if rng.random() < (GOOD_AFTER_PRAISE if review.is_praise else GOOD_AFTER_BLAME) else BAD


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reviews: list[Review]) -> float:
    """Measure the share of reviews after which the model's likeliest next word is the honest verdict."""
    model.eval()
    num_right = 0
    for start in range(0, len(reviews), EVAL_BATCH):
        part = reviews[start : start + EVAL_BATCH]
        batch = tokenizer([r.prompt for r in part], padding=True, padding_side="right", return_tensors="pt")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        last = batch["attention_mask"].sum(dim=1) - 1
        answers = logits[torch.arange(len(part)), last].argmax(dim=-1)
        wanted = torch.tensor([tokenizer.convert_tokens_to_ids(r.verdict) for r in part])
        num_right += int((answers == wanted).sum())
    return num_right / len(reviews)
