"""Hooks of `mkdocs build`: a site that needs the network to be read is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ELSEWHERE = r"[\"']?((?:https?:)?//[^\"'\s>)]+)"
_LOADED = {
    ".html": rf"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:src|href)={_ELSEWHERE}",
    ".css": rf"(?:url\(|@import)\s*{_ELSEWHERE}",
}
"""The addresses that a browser loads without being asked, by a file's ending. Links that a reader
may follow are not among them."""


def loaded_from_elsewhere(text: str, suffix: str) -> list[str]:
    """The addresses that a browser would fetch from another host for such a file."""
    return re.findall(_LOADED[suffix], text)


def on_post_build(config: Any, **_: Any) -> None:
    """Raise SystemExit, naming page and address, if a page of the site loads from elsewhere."""
    site = Path(config["site_dir"])
    wrong = [
        f"  {path.relative_to(site)}: {address}"
        for path in sorted(site.rglob("*"))
        if path.suffix in _LOADED
        for address in loaded_from_elsewhere(path.read_text(encoding="utf-8"), path.suffix)
    ]
    if wrong:
        raise SystemExit(
            "\n".join(["expected a site that loads nothing from elsewhere, got", *wrong])
        )
