"""Text to tokens and back: tokenizers, Arrow shards, batches."""
