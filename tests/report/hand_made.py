"""Curves and records of a made-up study, changed by hand."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stlm.evaluation.perplexity import TestText, document_rows, measure
from stlm.evaluation.predictions import CheckpointFacts, read_facts, write_predictions
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


def take_no_steps(study, name: str, **start):
    """The study with a run that keeps, as they are, the weights that it starts from (`start`: its record).

    Its curve has one row, and it has one checkpoint, of step 0.
    """
    own = study.runs[name]
    origin = start.get("run") or start["source"]
    keys = {"steps": 0, "start_from": origin, "checkpoints": ()}
    training = own.training.model_copy(update=keys)
    depends = {"start": {"tokens": 0, "flops": 0.0} | start}
    folder = own.folder
    curve = pd.read_csv(folder / "curve.csv").iloc[-1:].assign(step=0, tokens=0, seconds=0.0)
    blank = ["learning_rate", "train_loss", "grad_norm", "tokens_per_second"]
    curve.assign(**dict.fromkeys(blank)).to_csv(folder / "curve.csv", index=False)
    (folder / "watch.csv").write_text("step,layer\n")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    checkpoint, last = list(evaluation["checkpoints"].items())[-1]
    evaluation["checkpoints"] = {checkpoint: last | {"step": 0, "tokens": 0}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    items, facts = pq.read_table(folder / "items.parquet"), read_facts(folder / "items.parquet")
    items = items.filter(pc.equal(items["checkpoint"], checkpoint))
    place = items.schema.get_field_index("step")
    items = items.set_column(place, items.schema.field(place), pa.array([0] * len(items), pa.int64()))
    kept = CheckpointFacts.model_validate(evaluation["checkpoints"][checkpoint])
    write_predictions(
        folder / "items.parquet", items, facts.model_copy(update={"checkpoints": {checkpoint: kept}})
    )
    trained = [{"step": 0, "tokens": 0, "folder": checkpoint, "weights_sha256": last["weights_sha256"]}]
    costs = {"steps": 0, "tokens": 0, "flops": 0.0, "seconds": 0.4, "depends": depends}
    set_train(study, name, training=training.model_dump(mode="json"), checkpoints=trained, **costs)
    changes = {"training": training, "sources": {"start": start["source"]} if "source" in start else {}}
    return study.model_copy(update={"runs": study.runs | {name: own.model_copy(update=changes)}})


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
