"""Which text is read, how it becomes tokens, and how batches are cut from it."""

from dataclasses import dataclass, field

from phase2_jax.errors import UserError

FORMATS = ("auto", "text", "wikitext")
MODES = ("streams", "windows")
TOKENIZERS = ("bytes", "words")
TASKS = ("mqar", "induction", "selective_copying", "modular_sum")
# Of 64 bits, as TensorBoard keeps it among a run's settings.
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class TaskConfig:
    """A synthetic task instead of a text; `phase2_jax.data.tasks` defines them."""

    name: str = ""
    """ "mqar", "induction", "selective_copying" or "modular_sum"; empty reads a text."""
    vocab_size: int = 16
    """Token ids; of modular_sum the modulus."""
    num_items: int = 4
    """What a sequence holds to remember: pairs (mqar) or tokens (selective_copying)."""
    num_train: int = 0
    """Training sequences, all different; 0 = new ones for every batch."""
    num_valid: int = 1000
    seed: int = 0
    """Of the examples; train.seed only orders finite sets."""
    power: float = 0.01
    """MQAR: exponent a of the distance of queries, 1 is uniform."""
    random_fillers: bool = False
    """MQAR: tokens between the queries are random instead of 0."""
    mixture: str = ""
    """Finite sets of several kinds: comma-separated LENGTH:ITEMS:EXAMPLES (their shares of num_train and num_valid)."""

    @property
    def parts(self) -> tuple[tuple[int, int, int], ...]:
        """(length, items, examples) of every kind of the mixture."""
        return tuple(_part(entry) for entry in self.mixture.split(",") if self.mixture)

    def validate(self) -> None:
        """Raises UserError that names the first field out of range."""
        _one_of("data.task.name", self.name, ("", *TASKS))
        for name, least in (("vocab_size", 2), ("num_items", 1), ("num_train", 0), ("num_valid", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.task.{name}={getattr(self, name)} must be at least {least}")
        if self.seed > LARGEST_SEED:
            raise UserError(f"data.task.seed={self.seed} must be at most {LARGEST_SEED}")
        if self.name == "mqar" and self.vocab_size < 2 * max(self.num_items, *(part[1] for part in self.parts), 1) + 2:
            raise UserError(f"data.task.vocab_size={self.vocab_size} is too small for {self.num_items} different pairs")
        if self.name in ("induction", "selective_copying") and self.vocab_size < 3:
            raise UserError(f"data.task.vocab_size={self.vocab_size} must be at least 3")
        if self.mixture and not self.num_train:
            raise UserError("data.task.mixture needs data.task.num_train, the number of sequences in all")


def _part(entry: str) -> tuple[int, int, int]:
    numbers = entry.split(":")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"data.task.mixture has {entry!r}: write LENGTH:ITEMS:EXAMPLES, for example 64:4:100000")
    length, items, examples = map(int, numbers)
    return length, items, examples


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
    windows_in_a_row: int = 1
    """Neighbouring windows that a row reads, the memory carried over, before it goes on elsewhere (windows mode)."""
    fresh_state_fraction: float = 0.0
    """Share of rows whose memory is wiped at the start of a window (in windows mode the first in a row always is)."""
    random_start: bool = False
    """Each epoch starts at another token (streams mode), so that the text is not cut at the same places again."""
    task: TaskConfig = field(default_factory=TaskConfig)

    @property
    def carries_memory(self) -> bool:
        """Whether a batch may go on where the one before it ended."""
        return self.mode == "streams" or self.windows_in_a_row > 1

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
        if self.random_start and self.mode != "streams":
            raise UserError(f"data.random_start=True needs data.mode='streams', not {self.mode!r}: leave it off")
        if self.windows_in_a_row < 1:
            raise UserError(f"data.windows_in_a_row={self.windows_in_a_row!r} must be an integer of at least 1")
        if self.windows_in_a_row > 1 and (self.mode != "windows" or self.task.name):
            raise UserError(
                f"data.windows_in_a_row={self.windows_in_a_row} needs data.mode='windows' and a text: leave it at 1"
            )
        self.task.validate()
        self._validate_source()

    def _validate_source(self) -> None:
        if self.path and self.dataset:
            raise UserError(f"data.path={self.path!r} and data.dataset={self.dataset!r} exclude each other: keep one")
        if self.task.name and (self.path or self.dataset or self.mode != "windows"):
            raise UserError(
                f"data.task.name={self.task.name!r} needs data.mode='windows' and neither data.path nor data.dataset"
            )
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
