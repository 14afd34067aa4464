"""The built-in sample: English prose that is on every machine with Python.

CPython ships its language reference as plain text for ``help()`` (``pydoc_data.topics``, about 0.5 MB). Its topics
overlap: the same section is there under several names. Cleaned here so that no paragraph comes twice, because a
held-out part that was also trained on would measure memory instead of learning.
"""

from __future__ import annotations

import re
from functools import cache

from zero.errors import DataError

MIN_PROSE_WORDS = 6
MIN_PROSE_LETTERS = 0.82
MIN_DOCUMENT_CHARS = 200

_UNDERLINE = re.compile(r"^([*=\-^~\"'])\1{2,}$")


@cache
def builtin_documents() -> tuple[str, ...]:
    """The sample as documents, one for each section: its title, then its paragraphs, one a line, blank lines between.

    Same Python version, same documents in the same order.

    Raises:
        DataError: This Python comes without ``pydoc_data``.
    """
    seen: set[str] = set()
    documents: list[str] = []
    for _, topic in sorted(_topics().items()):
        for title, paragraphs in _sections(topic):
            fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
            seen.update(fresh)
            document = "\n\n".join([title, *fresh] if title else fresh)
            if fresh and len(document) >= MIN_DOCUMENT_CHARS:
                documents.append(document + "\n")
    return tuple(documents)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            'data.train = "builtin": this Python comes without pydoc_data, which the built-in sample is made of. '
            "Name a text file of your own instead, or install the full Python standard library."
        ) from error
    return dict(topics)


def _sections(topic: str) -> list[tuple[str, list[str]]]:
    """Cuts a topic at its underlined headings into (title, prose paragraphs)."""
    sections: list[tuple[str, list[str]]] = [("", [])]
    for block in re.split(r"\n[ \t]*\n", topic):
        lines = block.strip().splitlines()
        if len(lines) == 2 and _UNDERLINE.match(lines[1].strip()):
            sections.append((lines[0].strip(), []))
            continue
        paragraph = " ".join(block.split())
        if _is_prose(paragraph):
            sections[-1][1].append(paragraph)
    return sections


def _is_prose(paragraph: str) -> bool:
    """Grammar rules, interpreter sessions, code and tables are not: they have few words or few letters."""
    if len(paragraph.split()) < MIN_PROSE_WORDS or "::=" in paragraph or ">>>" in paragraph:
        return False
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return letters / len(paragraph) >= MIN_PROSE_LETTERS
