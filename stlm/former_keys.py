"""Keys that params/ had in earlier versions, and their replacements."""

from __future__ import annotations

# The end of a key's path -> the key that replaced it: budgets of tokens or documents are now in bytes.
_BUDGETS = {
    "training.validation_tokens": "validation_bytes",
    "training.validation_documents": "validation_bytes",
    "perplexity.max_tokens": "max_bytes",
}
_BYTES_PER_TOKEN = 3.5  # for English text and bpe-4096


def former_key(path: str, found: object) -> str | None:
    """Advice on replacing the key at `path` with the value `found`; None if there never was such a key."""
    former = next((key for key in _BUDGETS if f".{path}".endswith(f".{key}")), None)
    if former is None:
        return None
    key = _BUDGETS[former]
    tokens = isinstance(found, int) and not isinstance(found, bool) and former.endswith("_tokens")
    example = f"; {found} tokens are about {key}: {round(_BYTES_PER_TOKEN * found)}" if tokens else ""
    return (
        f"it was replaced by {key}: UTF-8 bytes of whole documents, the same for every tokenizer (bytes in a "
        f"token of English: bpe-4096 3.5, gpt2 4.5, bytes 1{example})"
    )
