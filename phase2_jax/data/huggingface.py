"""Data sets of the Hugging Face hub, through the optional extra `datasets`."""

from typing import Any

from phase2_jax.errors import UserError

# Not "test": what is looked at after every epoch is no longer a test set.
_VALIDATION_SPLITS = ("validation", "valid", "dev")
_EXTRA = 'install it with pip install "phase2-jax[datasets]"'


def load_rows(name: str) -> tuple[list[str], list[str]]:
    """Rows of the training and of the validation split; the latter is empty where the data set has none.

    Args:
      name: "name" or "name:config", for example "Salesforce/wikitext:wikitext-2-v1". The column "text" is read.

    Raises:
      UserError: the extra or the network is missing, or there is no such data set, training split or column.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"data.dataset={name!r} needs an extra: {_EXTRA}, or give data.path") from error
    repository, _, variant = name.partition(":")
    try:
        splits = datasets.load_dataset(repository, variant or None)
    except (OSError, ValueError, *_http_errors()) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data.dataset={name!r} cannot be loaded ({reason}): check the name and the network, or give data.path"
        ) from error
    if "train" not in splits:
        raise UserError(f"data.dataset={name!r} has no split 'train' (it has {', '.join(splits)}): choose another")
    validation = next((split for split in _VALIDATION_SPLITS if split in splits), None)
    return _texts(splits["train"], name), _texts(splits[validation], name) if validation else []


def _texts(split: Any, name: str) -> list[str]:
    if "text" not in split.column_names:
        columns = ", ".join(split.column_names)
        raise UserError(f"data.dataset={name!r} has no column 'text' (it has {columns}): choose another")
    return list(split["text"])


def _http_errors() -> tuple[type[Exception], ...]:
    """The hub's client is built on httpx, whose errors are no OSErrors; older ones used requests, whose errors are."""
    try:
        import httpx  # pyright: ignore[reportMissingImports]
    except ImportError:
        return ()
    return (httpx.HTTPError,)
