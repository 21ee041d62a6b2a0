"""Published models in Llama's layout, as models of ours: the kernels in C then score and write for them."""

from __future__ import annotations

from pathlib import Path

from stlm.evaluation.hf_folder import check_files, loading
from stlm.evaluation.hf_model import load_tokenizer
from stlm.evaluation.hf_tokenizer import HfTokenizer
from stlm.model.llama import NotLlamaError
from stlm.model.transformer import Transformer
from stlm.training.published import read_llama


def load_plain_llama(
    folder: Path, context: int | None = None, prefix: str | None = None
) -> tuple[Transformer, HfTokenizer] | None:
    """The model and tokenizer in a folder of `transformers`, if it is a plain Llama; None for others.

    Arguments, results and errors are those of `load_hf`, which loads the others.
    """
    folder = Path(folder)
    with loading(folder, "the folder"):
        check_files(folder)
    try:
        model = read_llama(folder, context)
    except NotLlamaError:
        return None
    tokenizer = load_tokenizer(folder, prefix)
    tokenizer.check_rows(model.config.vocab_size)
    return model, tokenizer
