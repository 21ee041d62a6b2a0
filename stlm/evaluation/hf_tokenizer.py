"""A `transformers` tokenizer with the interface of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stlm.errors import UserError, nearest


class HfTokenizer:
    """A `transformers` tokenizer with the interface of ours: it encodes texts and adds no special tokens.

    `eot` is the token that starts a text, given by `prefix`: either a token as the vocabulary spells it, or a
    text that is one token. None: as in lm_eval, the declared bos, otherwise eos. The attribute `prefix` is
    its spelling. `adds_bos`: whether the tokenizer itself puts its bos before a text; the token that starts a
    text then replaces it.

    Raises UserError for a prefix that is not a token, naming the nearest one.
    """

    def __init__(self, tokenizer: Any, name: str, prefix: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = 1 + max(self.ids.values(), default=-1)  # ids may have gaps
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        start = bos if prefix is None else self._id_of(prefix)
        if start is None:
            raise UserError(
                f"{name}: the tokenizer has neither a bos nor an eos token to start a text; give `prefix`"
            )
        self.eot: int = start
        self.prefix: str = tokenizer.convert_ids_to_tokens(start)
        added, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
        if added not in (plain, [bos, *plain]):
            raise UserError(
                f"{name}: the tokenizer adds {added} for {plain} ('a'); expected at most {bos} before it"
            )
        self.adds_bos = added != plain
        eos = tokenizer.eos_token_id
        self.eos: int = start if eos is None else eos  # ends a text

    @property
    def added(self) -> set[int]:
        """The ids of added tokens, special and other ones, which are not part of the vocabulary."""
        return set(self._tokenizer.get_added_vocab().values()) | set(self._tokenizer.all_special_ids)

    @property
    def decoders(self) -> list[str]:
        """The names that the tokenizers library gives to the decoders that turn tokens into text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        kinds = (decoder or {}).get("decoders", [decoder] if decoder else [])
        return [kind["type"] for kind in kinds]

    def _id_of(self, prefix: str) -> int:
        if prefix in self.ids:
            return self.ids[prefix]
        found = self._tokenizer(prefix, add_special_tokens=False)["input_ids"]
        if len(found) == 1:
            return found[0]
        special = list(self._tokenizer.get_added_vocab()) or list(self._tokenizer.all_special_tokens)
        hint = nearest(prefix, special)
        if "did you mean" not in hint and len(special) > 20:
            hint = nearest(prefix, special[:20])[:-1] + ", ...)"
        raise UserError(f"prefix: {prefix!r} is no token of {self.name}{hint}")

    def check_rows(self, rows: int) -> None:
        """Raise UserError if an id has no row in the model; rows without an id are padding."""
        beyond = sorted((id_, token) for token, id_ in self.ids.items() if id_ >= rows)
        if beyond:
            shown = ", ".join(f"{token!r} ({id_})" for id_, token in beyond[:3])
            raise UserError(
                f"{self.name}: the tokenizer has {self.vocab_size:,} tokens, the model's embedding {rows:,}: "
                f"{len(beyond):,} have no row, first {shown}; they do not belong together"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the tokens that start texts."""
        return self._tokenizer.decode([token for token in ids if token != self.eot])
