"""Which text is read, how it becomes tokens, and how batches are cut from it."""

from dataclasses import dataclass

from phase2_jax.errors import UserError

FORMATS = ("auto", "text", "wikitext")
MODES = ("streams", "windows")
TOKENIZERS = ("bytes", "words")


@dataclass(frozen=True)
class DataConfig:
    """Everything under `data.` in a configuration; `docs/data.md` explains each field with examples."""

    path: str = ""
    """Text file (plain, .gz or .xz) or folder of such files; empty means the text the package ships."""
    valid_path: str = ""
    """Validation text, file or folder; empty holds back `valid_fraction` of the training text."""
    dataset: str = ""
    """Name of a Hugging Face dataset, "name" or "name:config"; needs the extra `datasets`."""
    tokenizer: str = "bytes"
    """ "bytes", "words" (the WikiText convention), or the path of a Hugging Face tokenizer.json."""
    format: str = "auto"
    """ "text", "wikitext" (articles are documents), or "auto", which recognises WikiText."""
    document_separator: str = ""
    """String that ends a document inside a file; it stays in the text."""
    valid_fraction: float = 0.1
    """Share of the characters held back for validation where there is no validation text."""
    mode: str = "streams"
    """ "streams" (rows run through the text, memory carries over) or "windows" (shuffled, memory starts empty)."""
    fresh_state_fraction: float = 0.0
    """Share of rows whose memory is wiped at the start of a window, streams mode (windows always start empty)."""

    def validate(self) -> None:
        """Raises UserError for a value that cannot work; whether files exist is found out when they are read."""
        _one_of("data.format", self.format, FORMATS)
        _one_of("data.mode", self.mode, MODES)
        if self.tokenizer not in TOKENIZERS and not self.tokenizer.endswith(".json"):
            raise UserError(
                f"data.tokenizer={self.tokenizer!r} is unknown: use 'bytes', 'words' or the path of a tokenizer.json"
            )
        if not 0.0 < self.valid_fraction < 1.0:
            raise UserError(f"data.valid_fraction={self.valid_fraction!r} must lie between 0 and 1, both excluded")
        if not 0.0 <= self.fresh_state_fraction <= 1.0:
            raise UserError(f"data.fresh_state_fraction={self.fresh_state_fraction!r} must lie in [0, 1]")
        self._validate_source()

    def _validate_source(self) -> None:
        if self.path and self.dataset:
            raise UserError(f"data.path={self.path!r} and data.dataset={self.dataset!r} exclude each other: keep one")
        shipped = not self.path and not self.dataset
        if shipped and self.document_separator:
            raise UserError("data.document_separator needs data.path: the shipped text knows its own documents")
        if shipped and self.format == "wikitext":
            raise UserError("data.format='wikitext' needs data.path: the shipped text is not in that format")
        if self.format == "wikitext" and self.document_separator:
            raise UserError("data.document_separator and data.format='wikitext' exclude each other: keep one")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}")
