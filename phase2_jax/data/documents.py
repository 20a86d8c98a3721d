"""Where documents begin, and which text is held back for validation."""

import hashlib
import json
import re
from importlib import resources
from itertools import pairwise

from phase2_jax.errors import UserError

# A title line between two empty lines. The empty lines matter: tables and formulas leave look-alikes such as
# " = Goals ; A = " in running text; with them WikiText-2 has its 600 + 60 articles, without them 29 more.
_TITLE_LINE = r"(?P<title> = (?!= )[^\n]*?(?<! =) = ?\r?\n)(?= ?\r?\n)"
_WIKITEXT_TITLE = re.compile(r"(?:\A(?: ?\r?\n)?|(?<=\n) ?\r?\n)" + _TITLE_LINE)
_TITLE_FIRST = re.compile(r"(?:\s*\n)?" + _TITLE_LINE)


def shipped_documents() -> list[str]:
    """The works of the text inside the package, in order; joined they are the file.

    Raises:
      UserError: the file is not the one that was shipped (its works could not be told apart).
    """
    folder = resources.files("phase2_jax.data") / "text"
    index = json.loads((folder / "works.json").read_text(encoding="utf-8"))
    raw = (folder / index["file"]).read_bytes()
    if hashlib.sha256(raw).hexdigest() != index["sha256"]:
        raise UserError(f"the shipped text {index['file']} was altered (line endings converted?): reinstall phase2-jax")
    text = raw.decode("ascii")
    return _cut(text, [work["start"] for work in index["works"]])


def split_text(text: str, format: str, separator: str) -> list[str]:
    """Splits one file into documents; joined they are the file, so no character is lost.

    Args:
      text: the whole file.
      format: "auto", "text" or "wikitext"; "auto" means WikiText if the first line that is not empty is a title.
      separator: ends a document and stays with it; empty for none.
    """
    if separator:
        return _split_at_separator(text, separator)
    if is_wikitext(text, format):
        starts = [match.start("title") for match in _WIKITEXT_TITLE.finditer(text)]
        # What stands before the first title (an empty line, in WikiText) goes with the first article.
        return _cut(text, [0, *starts[1:]])
    return [text]


def is_wikitext(text: str, format: str) -> bool:
    """Whether `text` is to be cut into articles: it has a title at all ("wikitext") or begins with one ("auto")."""
    if format == "auto":
        return _TITLE_FIRST.match(text) is not None
    return format == "wikitext" and _WIKITEXT_TITLE.search(text) is not None


def hold_back(documents: list[str], fraction: float, *, whole: bool = True) -> tuple[list[str], list[str]]:
    """Splits documents into a training and a validation part, without chance.

    Whole documents are held back, spread evenly over the corpus, as many as fit into `fraction` of its characters.
    Where that gives less than half of what was asked for (few documents), or with `whole=False`, the end of every
    document is held back: the last `fraction` of its characters.
    """
    if whole and len(documents) > 1:
        train, valid = _hold_back_whole(documents, fraction)
        if sum(map(len, valid)) >= fraction * sum(map(len, documents)) / 2 and train:
            return train, valid
    cuts = [int(len(document) * (1 - fraction)) for document in documents]
    train = [document[:cut] for document, cut in zip(documents, cuts, strict=True)]
    valid = [document[cut:] for document, cut in zip(documents, cuts, strict=True)]
    return [text for text in train if text], [text for text in valid if text]


def _hold_back_whole(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    train: list[str] = []
    valid: list[str] = []
    seen = held = 0
    for document in documents:
        seen += len(document)
        fits = held + len(document) <= fraction * seen
        held += len(document) if fits else 0
        (valid if fits else train).append(document)
    return train, valid


def _split_at_separator(text: str, separator: str) -> list[str]:
    *closed, rest = text.split(separator)
    documents = [piece + separator for piece in closed]
    # A final line break after the last separator is no document of its own.
    if documents and not rest.strip():
        documents[-1] += rest
    elif rest:
        documents.append(rest)
    return documents


def _cut(text: str, starts: list[int]) -> list[str]:
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]
