"""`stlm export`: writes a run's checkpoint and model card for other libraries, to a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from stlm.errors import UserError
from stlm.export.llama import FILES, GENERATION, export_llama
from stlm.files import disk_errors
from stlm.report.card import read_card
from stlm.training.checkpoint_names import find_checkpoint
from stlm.units import byte_size

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
inputs = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt", split_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True, temperature=0.8)[0]))
```

A document begins after the end-of-text token, as in training."""


def export(run: str, folder: Path, force: bool = False) -> None:
    """Write the checkpoint that `run` refers to (see `find_checkpoint`) to `folder`, as `export_llama` does.

    README.md is its model card; without a train.json next to the checkpoint there is none. An empty folder is
    filled; with `force`, an earlier export is replaced. Raises UserError for any other existing folder, and
    for a model that is not a Llama.
    """
    checkpoint = find_checkpoint(run)
    _check_target(folder, force)
    card = read_card(checkpoint)
    text = None
    if card is not None:
        # The folder's name may be invalid UTF-8, but the card must be valid.
        named = folder.name.encode(errors="backslashreplace").decode()
        text = card.markdown(library_name="transformers", use=_USE.format(folder=named))
    export_llama(checkpoint, folder, text)
    print(f"wrote {folder}" + ("" if text else "; no model card, as no train.json is beside the checkpoint"))


def export_file(
    run: str, path: Path, kind: str = "F32", fallback: str | None = None, force: bool = False
) -> None:
    """Write the checkpoint that `run` refers to to the GGUF file `path`, as `export_gguf` does.

    Its metadata has what the model card says, and the card. With `force`, another GGUF file is replaced.
    Raises UserError for any other existing path, and for a model or tokenizer that llama.cpp cannot read.
    """
    from stlm.export.gguf_card import about_model
    from stlm.export.gguf_export import export_gguf

    checkpoint = find_checkpoint(run)
    _check_file(path, force)
    about = about_model(read_card(checkpoint), checkpoint)
    stored = export_gguf(checkpoint, path, kind, fallback, about)
    tensors = ", ".join(f"{number} of {name}" for name, number in stored.items())
    print(f"wrote {path}: {byte_size(path.stat().st_size)}, tensors: {tensors}")


def _check_file(path: Path, force: bool) -> None:
    if "\0" in str(path):
        raise UserError(f"{str(path)!r}: the name of a file has no null character")
    with disk_errors(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        if not path.exists():
            return
        if not force:
            raise UserError(f"{path}: is there already; --force replaces a GGUF file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: is no GGUF file, and not replaced; name another file")


def _check_target(folder: Path, force: bool) -> None:
    if "\0" in str(folder):
        raise UserError(f"{str(folder)!r}: the name of a folder has no null character")
    with disk_errors(folder):
        # Raises if the file system rejects the name, for example for its length; a missing folder is fine.
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    if found is not None:
        if not found:
            return
        if GENERATION not in found or not found <= FILES:
            raise UserError(f"{folder}: holds other files than an exported model; name another folder")
        if not force:
            raise UserError(f"{folder}: holds an exported model already; --force replaces it")
    elif folder.exists():
        raise UserError(f"{folder}: is a file; name a folder")
