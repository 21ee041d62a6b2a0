"""What a run reads the weights of: the last checkpoints of other runs, and published models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stlm.errors import UserError
from stlm.files import sha256
from stlm.integrity import check_listed
from stlm.model.config import ModelConfig
from stlm.model.counts import is_training_only
from stlm.model.transformer import Transformer
from stlm.study.catalogues import load_models
from stlm.study.runs import Run
from stlm.tokens.config import DataConfig
from stlm.tokens.names import hf_name
from stlm.tokens.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from stlm.training.checkpoint_names import WEIGHTS
from stlm.training.checkpoints import last_checkpoint, load_checkpoint, read_description

# Published models, as `stlm fetch NAME` writes them.
RAW = Path("data/raw")


@dataclass(frozen=True)
class Dependency:
    """The last checkpoint of a run, or a published model, on which another run depends.

    `folder`: the checkpoint, or the fetched model. `record`: for train.json. `text_tokens`: the tokens of the
    training text that had been read when the weights were done, by the run and by those that it started from;
    0 for a published model.
    """

    name: str
    published: bool
    folder: Path
    model: ModelConfig
    weights_sha256: str
    tokenizer: str
    text_tokens: int = 0
    description: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Run, role: str) -> Dependency:
        """What `run` depends on in `role`; raises ``UserError`` where it is not there yet."""
        return cls._of_model(run.sources[role]) if role in run.sources else cls._of_run(run, role)

    @classmethod
    def _of_run(cls, run: Run, role: str) -> Dependency:
        name = run.depends[role]
        folder = last_checkpoint(run, name)
        model, description = read_description(folder)
        tokens: int = description["tokens"]
        flops = description.get("flops")
        if flops is None:  # a checkpoint of an earlier version, without techniques
            other = run.model_copy(update={"model": model, "techniques": {}})
            flops = tokens * other.flops_per_token
        start = description.get("depends", {}).get("start", {})
        record = {
            "run": name,
            "weights_sha256": description["weights_sha256"],
            "step": description["step"],
            "tokens": tokens,
            # Of that training only; `depends` covers what it depended on in turn.
            "flops": flops,
            **({"depends": description["depends"]} if "depends" in description else {}),
        }
        return cls(
            name,
            False,
            folder,
            model,
            description["weights_sha256"],
            description.get("tokenizer", run.tokenizer),
            # A record of an earlier version has no `text_tokens`: such a run read on in its origin's text.
            tokens + start.get("text_tokens", start.get("tokens", 0)),
            description,
            record,
        )

    @classmethod
    def _of_model(cls, name: str) -> Dependency:
        folder, entry = check_fetched(name), load_models()[name]
        digest = sha256(folder / WEIGHTS)
        record = {
            "source": name,
            "licence": entry.licence,
            "origin": entry.origin,
            "weights_sha256": digest,
            # What its makers trained it on; nothing of that was spent here.
            "training_tokens": entry.training_tokens,
            "tokens": 0,
            "flops": 0.0,
        }
        model = entry.model.config
        return cls(name, True, folder, model, digest, f"hf:{name}", record=record)

    def load(self, device: str | torch.device = "cpu") -> Transformer:
        """The model in evaluation mode, float32; raises ``UserError`` where its files are damaged."""
        if self.published:
            from stlm.training.published import load_published

            return load_published(self.folder, device).eval()
        model = load_checkpoint(self.folder, device)[0]
        # What served that training, such as maps to its teacher's states, has no place in another.
        for name, child in list(model.named_children()):
            if is_training_only(child) or not getattr(child, "inherited", True):
                delattr(model, name)
        return model

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with its tokenizer's files."""
        return self.folder if self.published else self.folder.parent / "tokenizer"

    def goes_on(self, run: Run) -> bool:
        """Whether `run`, which starts from these weights, reads on in the text that they were trained on.

        It does where the text, its tokens, its rows and their order are the same; otherwise it starts at the
        beginning. Orders other than the shuffled one depend on the length of the training.
        """
        if self.published:
            return False
        data = DataConfig.model_validate(self.description.get("data", {}))
        same = (
            self.description.get("corpus", run.corpus) == run.corpus
            and self.tokenizer == run.tokenizer
            and self.model.context == run.model.context
            and data.unlimited == run.data.unlimited
        )
        return same and run.data.order == "shuffled" and not run.data.sequence and run.data.select is None

    def ids(self, folder: Path) -> np.ndarray | None:
        """int64: the dependency's id of each token of the tokenizer in `folder`; None: the ids are the same.

        Raises ``UserError`` where a token is not in the dependency's vocabulary.
        """
        tokenizer = load_tokenizer(folder)
        name, whole = hf_name(tokenizer.name), hf_name(self.tokenizer)
        if tokenizer.name == self.tokenizer:
            if not self.published and self.model.bytes is None:
                check_tokenizer(self.tokenizer_folder, check_tokenizer(folder))
            return None
        if name is None or whole is None or whole.model != name.model:
            raise UserError(f"{folder}: {tokenizer.name} has other tokens than {self.name}: {self.tokenizer}")
        if whole.size is None:
            return _parent_ids(tokenizer)
        own = _parent_ids(load_tokenizer(self.tokenizer_folder))
        places = {parent: number for number, parent in enumerate(own.tolist())}
        wanted = _parent_ids(tokenizer).tolist()
        missing = sum(parent not in places for parent in wanted)
        if missing:
            raise UserError(
                f"{folder}: {missing:,} of the {len(wanted):,} tokens of {tokenizer.name} are not among the "
                f"{len(own):,} of {self.name}: {self.tokenizer}; start from a model that has them"
            )
        return np.array([places[parent] for parent in wanted], np.int64)


def _parent_ids(tokenizer: Tokenizer) -> np.ndarray:
    return np.asarray(tokenizer.parent_ids, np.int64)


def check_fetched(name: str) -> Path:
    """The folder of a published model; raises ``UserError`` if it was not fetched, or changed since."""
    folder, files = RAW / name, (WEIGHTS, "config.json")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file; run: stlm fetch {name}")
    check_listed(folder / "source.json", *files)
    return folder


def read_dependencies(run: Run) -> dict[str, Dependency]:
    """Map each role to what the run depends on. Raises ``UserError`` where it is not there yet."""
    return {role: Dependency.read(run, role) for role in run.dependencies}
