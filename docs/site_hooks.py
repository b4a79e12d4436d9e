"""Turn references of Hugging Face's docstrings, such as [`~trl.SFTTrainer`], into plain names on the API page.

The docstrings of trainers follow the format of transformers and TRL, whose own tool resolves these references.

Does not: make links, or touch pages that are not made from docstrings.
"""

import re
from typing import Any

__all__ = ["on_page_content"]

_IN_TEXT = re.compile(r"\[<code>~?([\w.]+)</code>\]")
_IN_TYPES = re.compile(r"\[?`~?([\w.]+)`\]?(?=[^<]*</code>)")


def on_page_content(html: str, page: Any, **others: Any) -> str:
    """Replace each reference by the last part of its name. mkdocs calls this with the HTML of each page."""
    if page.file.src_uri != "reference/api.md":
        return html
    html = _IN_TEXT.sub(lambda found: f"<code>{found[1].split('.')[-1]}</code>", html)
    html = _IN_TYPES.sub(lambda found: found[1].split(".")[-1], html)
    return html.replace("*optional*", "optional").replace("<p>::</p>", "")
