"""This module renders docs/support.md: the status of every argument of the upstream configs, one row per field.

Run `make docs-pages` after a change of upstream_arguments.py or of versions.

Does not: classify anything (upstream_arguments.py does).
Invariant: a field is listed once, under the first config that has it.
"""

from collections.abc import Iterator
from importlib.metadata import version

from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from zo2trl.trainers.arguments.refusals import upstream_fields
from zo2trl.trainers.arguments.upstream_arguments import AS_UPSTREAM, REFUSED, SUPPORTED, WITHOUT_EFFECT

__all__ = ["CONFIGS", "classify", "support_page", "versions"]

CONFIGS = (TrainingArguments, SFTConfig, DPOConfig, RewardConfig)
"""The configs in the order of the page."""

_HEAD = """# What becomes of upstream's arguments

Generated from the dataclasses of {versions} by `make docs-pages`; do not edit.
`tests/trainers/arguments/test_refusals.py` fails when a field is missing here, when a refused one is taken, when one
without effect is not warned about, and when no test uses a supported one.

- **supported**: does what upstream's documentation says, or what the note says.
- **no effect**: a value other than the default is warned about, and changes nothing.
- **refused**: a value other than the default raises `UnsupportedError`, before anything is loaded or written.

Beside these: an optimizer or a scheduler passed to the trainer (`optimizers=`, `optimizer_cls_and_kwargs=`) is
refused, and so is a launch for DeepSpeed or FSDP. zo2trl's own arguments have
[a page of their own](reference/arguments.md).
"""


def versions() -> str:
    """Return the upstream versions that the page describes."""
    return f"transformers {version('transformers')} and TRL {version('trl')}"


def classify(name: str) -> tuple[str, str]:
    """Return the status and the note of a field.

    Raises:
        KeyError: the field is in no table.
    """
    for status, table in (("refused", REFUSED), ("no effect", WITHOUT_EFFECT), ("supported", SUPPORTED)):
        if name in table:
            return status, "" if table[name] == AS_UPSTREAM else table[name]
    raise KeyError(name)


def support_page() -> str:
    """Render the whole page as Markdown."""
    return _HEAD.format(versions=versions()) + "\n".join(_sections()) + "\n"


def _sections() -> Iterator[str]:
    seen: set[str] = set()
    for config_class in CONFIGS:
        names = [name for name in upstream_fields(config_class) if name not in seen]
        seen.update(names)
        module = "transformers" if config_class is TrainingArguments else "trl"
        yield f"\n## {module}.{config_class.__name__}\n"
        yield "| argument | status | note |\n|---|---|---|"
        yield from (_row(name) for name in names)


def _row(name: str) -> str:
    status, note = classify(name)
    return f"| `{name}` | {status} | {note} |"
