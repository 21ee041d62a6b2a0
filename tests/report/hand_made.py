"""Curves and records of a made-up study, changed by hand."""

import json

import numpy as np
import pandas as pd


def set_curve(study, run: str, tokens, seconds, bits) -> None:
    rows = {"step": tokens, "tokens": tokens, "seconds": seconds, "val_bits_per_byte": bits}
    fixed = dict.fromkeys(("learning_rate", "train_loss", "grad_norm", "tokens_per_second"), 1.0)
    curve = pd.DataFrame(rows | {"val_loss": bits, "val_char_perplexity": 2.0 ** np.array(bits)} | fixed)
    blank = pd.DataFrame({"step": [50], "tokens": [50], "seconds": [5], **fixed})
    pd.concat([blank, curve]).sort_values("step").to_csv(study.runs[run].folder / "curve.csv", index=False)


def set_train(study, run: str, **keys) -> None:
    path = study.runs[run].folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def begin_from(study, run: str, origin: str, tokens: int, flops: float, **keys):
    """The study with a run that starts from another's weights, and its record to match."""
    own = study.runs[run]
    training = own.training.model_copy(update={"start_from": origin})
    start = {"run": origin, "tokens": tokens, "flops": flops}
    set_train(study, run, training=training.model_dump(mode="json"), start=start, **keys)
    changed = own.model_copy(update={"training": training})
    return study.model_copy(update={"runs": study.runs | {run: changed}})


def set_test(study, run: str, **keys) -> None:
    """Change what the last checkpoint measured on test text."""
    path = study.runs[run].folder / "evaluation.json"
    record = json.loads(path.read_text())
    list(record["checkpoints"].values())[-1]["perplexity"].update(keys)
    path.write_text(json.dumps(record))
