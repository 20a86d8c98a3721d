"""Text in, batches out: corpora, tokenizers and the input pipeline."""

from phase2_jax.data.batch import Batch
from phase2_jax.data.config import DataConfig
from phase2_jax.data.corpora import Corpus, TaskCorpus, TokenStream, encode_documents, load_corpus, load_data
from phase2_jax.data.pipeline import eval_batches, steps_per_epoch, train_dataset, train_iterator
from phase2_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    WordTokenizer,
    from_json,
    load_tokenizer,
    save_tokenizer,
)

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "HuggingFaceTokenizer",
    "TaskCorpus",
    "TokenStream",
    "Tokenizer",
    "WordTokenizer",
    "encode_documents",
    "eval_batches",
    "from_json",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "save_tokenizer",
    "steps_per_epoch",
    "train_dataset",
    "train_iterator",
]
