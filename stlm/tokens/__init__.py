"""Text to tokens and back: tokenizers, Arrow shards, batches."""

from stlm.tokens.shards import ComponentTokens, read_split
from stlm.tokens.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ComponentTokens", "Tokenizer", "load_tokenizer", "read_split"]
