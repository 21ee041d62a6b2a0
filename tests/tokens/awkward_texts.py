"""Texts that tokenizers may get wrong."""

from __future__ import annotations

import random

EDGES = [
    "",
    " ",
    "\0a\0\0",
    "<|endoftext|> is text <|endoftext|>",
    "don't  stop\t\n\n  it's 2024 ",
    "naïve café 水 🙂\u200d👩 \U0010ffff",
    " " * 5000 + "x" + "\n" * 3000,
    "\xa0\u3000\x85\x1c\u2028",
]


def random_texts(n: int) -> list[str]:
    """Texts of random bytes where they are UTF-8, of random code points, and of random pieces of both."""
    draw = random.Random(7)
    texts = []
    for _ in range(n):
        bytes_ = draw.randbytes(draw.randrange(40)).decode(errors="replace")
        points = "".join(
            chr(p) for p in draw.choices(range(0x110000), k=draw.randrange(30)) if not 0xD800 <= p < 0xE000
        )
        ascii_ = "".join(draw.choices("ab '1\n\t.", k=draw.randrange(60)))
        texts.append("".join(draw.sample([bytes_, points, ascii_], 3)))
    return texts
