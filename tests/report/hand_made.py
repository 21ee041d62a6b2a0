"""Curves and records of a made-up study, changed by hand."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from stlm.evaluation.perplexity import TestText, document_rows, measure
from stlm.tokens.shards import Document


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


def set_documents(study, run: str, bits, n_bytes, components=None, texts=None, total: int = 40) -> None:
    """Give the last checkpoint these documents, in all files as `stlm evaluate` writes them.

    `bits` and `n_bytes` of each; `texts`: numbers that stand for their texts.
    """
    folder = study.runs[run].folder
    path = folder / "evaluation.json"
    record = json.loads(path.read_text())
    name, checkpoint = list(record["checkpoints"].items())[-1]
    components = components or ["toy"] * len(bits)
    documents = [Document(np.zeros(n // 4, np.int32), n, n) for n in n_bytes]
    ids = np.array(range(len(bits)) if texts is None else texts, np.uint64)
    text = TestText(documents, components, ids, total, 10 * sum(n_bytes))

    class Model:
        def document_loglikelihoods(self, tokens, stride, progress):
            return [-own * math.log(2) for own in bits]

    checkpoint["perplexity"], nats = measure(Model(), text, 5)
    path.write_text(json.dumps(record))
    pq.write_table(document_rows(name, checkpoint["step"], text, nats), folder / "documents.parquet")
