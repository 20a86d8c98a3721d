"""Values that cannot work are refused by name before any file is opened."""

import pytest

from phase2_jax.data import DataConfig
from phase2_jax.errors import UserError


def test_the_defaults_are_valid():
    DataConfig().validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "byte"}, r"data\.tokenizer='byte' is unknown: use 'bytes', 'words'"),
        ({"mode": "stream"}, r"data\.mode='stream' is unknown: use one of 'streams', 'windows'"),
        ({"format": "wiki"}, r"data\.format='wiki' is unknown"),
        ({"valid_fraction": 0.0}, r"data\.valid_fraction=0\.0 must lie between 0 and 1"),
        ({"valid_fraction": 1.0}, r"data\.valid_fraction=1\.0"),
        ({"valid_fraction": float("nan")}, r"data\.valid_fraction=nan"),
        ({"fresh_state_fraction": -0.1}, r"data\.fresh_state_fraction=-0\.1"),
        ({"fresh_state_fraction": 1.5}, r"data\.fresh_state_fraction=1\.5"),
        ({"windows_in_a_row": 0, "mode": "windows"}, r"data\.windows_in_a_row=0"),
        ({"windows_in_a_row": 4}, r"data\.windows_in_a_row=4 needs data\.mode='windows'"),
        ({"random_start": True, "mode": "windows"}, r"data\.random_start=True needs data\.mode='streams'"),
        ({"path": "a.txt", "dataset": "b"}, "exclude each other"),
        ({"document_separator": "---"}, r"data\.document_separator needs data\.path"),
        ({"format": "wikitext"}, r"data\.format='wikitext' needs data\.path"),
        ({"path": "a.txt", "format": "wikitext", "document_separator": "x"}, "exclude each other"),
    ],
)
def test_a_bad_value_is_named_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        DataConfig(**changes).validate()
    assert "\n" not in str(caught.value)
