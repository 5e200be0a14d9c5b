"""Docstrings of the package as Markdown: an extension of griffe, which mkdocstrings reads with."""

from __future__ import annotations

import re
from typing import Any

import griffe

_STARTS = re.compile(r"(Shapes?|Parameters?|Shapes, parameters and key|Raises|No parameters)\b")
"""The words that begin a new paragraph of a docstring."""

_TABLE = re.compile(r"\S {3,}\S")
"""Three spaces in a row, which only a table has."""

_ADDRESS = re.compile(r"https://\S+")


def to_markdown(docstring: str) -> str:
    """A docstring whose doctests are code blocks, addresses links, and statements paragraphs."""
    blocks = [_block(block) for block in re.split(r"\n\s*\n", docstring.strip("\n"))]
    return "\n\n".join(blocks)


def _block(block: str) -> str:
    lines = block.split("\n")
    if lines[0].lstrip().startswith(">>>"):
        indent = len(lines[0]) - len(lines[0].lstrip())
        return "\n".join(["```pycon", *(line[indent:] for line in lines), "```"])
    if lines[0].startswith("    "):  # a formula or a table: shown as it is
        return block
    if _TABLE.search(lines[0]):
        return "\n".join(["```text", *lines, "```"])
    text = ""
    for line in lines:
        starts = _STARTS.match(line) or line.startswith("https://")
        text += ("\n\n" if starts and text else "\n" if text else "") + line
    return _ADDRESS.sub(lambda address: f"<{address[0]}>", text)


class Docstrings(griffe.Extension):
    """Turns every docstring into Markdown when it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        # griffe does not know init=False: it would show a constructor without arguments.
        cls.decorators = [d for d in cls.decorators if "init=False" not in str(d.value)]
