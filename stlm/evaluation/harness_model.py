"""STLM in the reference harness: `lm_eval --model stlm --model_args run=results/desk/runs/baseline-s0`.

Prompts, tasks and metrics are the harness's; log-probabilities come from the engine of `stlm evaluate`. The
command that knows this model is in `stlm.evaluation.harness_command`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from stlm.errors import UserError, nearest
from stlm.evaluation.encoding import Encoded, RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import last_answered, window_begin
from stlm.model.counts import parameter_groups
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.checkpoint_names import find_checkpoint
from stlm.training.checkpoints import check_fits, load_checkpoint

# Tokens to generate if a task states no number, as in lm_eval's `hf`.
MAX_GENERATED = 256
# Sequences generated at once, unless `--batch_size` says otherwise.
_GENERATED_AT_ONCE = 32
_PRECISIONS = ("float32", "bfloat16")
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}

Sequences = list[tuple[tuple[str, str] | None, list[int], list[int]]]


@register_model("stlm")
class StlmLM(TemplateLM):
    """A checkpoint as a model of the harness.

    Arguments, as in `--model_args run=FOLDER,dtype=bfloat16`:
    run: STUDY/RUN, a run's folder (its last checkpoint, or the one at @STEP), or a checkpoint's folder.
    device: cpu, cuda or cuda:N; default: CUDA if available.
    dtype: the forward pass's, float32 or bfloat16.
    batch_size: sequences of the context's length in a forward pass; 1 (the harness's default) and `auto`
    leave it to the engine. It changes the speed, not the scores.

    Raises UserError for a wrong argument, or a checkpoint that is missing or damaged.
    """

    def __init__(
        self,
        run: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for key in unknown:
            hint = nearest(key, ["run", "device", "dtype", "batch_size"])
            raise UserError(f"--model_args {key}: not an argument of the model stlm{hint}")
        if run is None:
            raise UserError("--model_args run=FOLDER is missing: a run's folder, or a checkpoint's")
        if dtype not in _PRECISIONS:
            raise UserError(f"--model_args dtype={dtype}: expected {' or '.join(_PRECISIONS)}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._device = torch.device(device)
        except RuntimeError:
            raise UserError(f"--device {device}: expected cpu, cuda or cuda:N") from None
        if self._device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {device}: expected cpu, cuda or cuda:N")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            # The harness passes cuda:0 by default; its own models, too, fall back to the CPU.
            logging.getLogger(__name__).warning(
                "--device %s: torch finds no CUDA device; using the CPU", device
            )
            self._device = torch.device("cpu")
        folder = find_checkpoint(run)
        transformer, self.description = load_checkpoint(folder)
        if transformer.config.bytes is not None:
            raise UserError(
                f"run={run}: a byte-level model, and the harness scores tokens; expected a model over tokens "
                "(stlm evaluate scores both)"
            )
        self.stlm_tokenizer = load_tokenizer(folder.parent / "tokenizer")
        check_fits(transformer, self.stlm_tokenizer, folder)
        size = int(batch_size) if str(batch_size).isdigit() else 1
        self.batch_size = size if size > 1 else _GENERATED_AT_ONCE
        self.model = TokenModel(
            transformer,
            RequestEncoder(self.stlm_tokenizer),
            str(self._device),
            dtype,
            size * transformer.config.context if size > 1 else None,
        )

    @property
    def eot_token_id(self) -> int:
        return self.stlm_tokenizer.eot

    @property
    def max_length(self) -> int:
        return self.model.context

    @property
    def max_gen_toks(self) -> int:
        return MAX_GENERATED

    @property
    def tokenizer_name(self) -> str:
        """An identifier of the vocabulary: the `bpe-4096` of two corpora differ."""
        content = hashlib.sha256(b"".join(self.stlm_tokenizer.files.values())).hexdigest()
        return f"stlm-{self.stlm_tokenizer.name}-{content[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """The facts about the model that the harness writes to its results."""
        return {
            "model_num_parameters": sum(parameter_groups(self.model.transformer).values()),
            "model_dtype": self.model.precision,
            "model_sha": self.description["weights_sha256"],
            "model_step": self.description["step"],
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text. No special tokens are added."""
        return self.stlm_tokenizer.encode(string)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without end-of-text tokens."""
        return self.stlm_tokenizer.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: Sequences, disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [
            Encoded(np.asarray(context + continuation, dtype=np.int32), len(context), False)
            for _, context, continuation in requests
        ]
        with tqdm(total=len(encoded), disable=disable_tqdm, desc="stlm: log-probabilities") as bar:
            scores = self.model.score_tokens(encoded, greedy=True, progress=bar.update)
        answers = [(score.logprob, bool(score.greedy)) for score in scores]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            # The windows of a rolling request have no text.
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of whole texts; each token is scored once, the first after the end-of-text token.

        Windows are those of lm_eval's `hf`: each has the context's length, and as much left context as fits.
        """
        windows: Sequences = []
        owners = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (logprob, _) in zip(owners, answers, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to a stop string, the end of text or `max_gen_toks` tokens.

        Greedy unless `temperature` is above 0 or `do_sample` is set; then `top_k` and `top_p` apply in this
        order after the temperature, as in `transformers`. The last `max_length - max_gen_toks` tokens of a
        context are read (lm_eval's rule); if more is generated than fits, the window moves on as in `stlm
        generate`.
        """
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="stlm: generation") as bar:
            for numbers in groups.values():
                options = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_GENERATED))
                eos = self.stlm_tokenizer.eot_spelling
                stops = handle_stop_sequences(options.pop("until", None), eos=eos)
                length = options.pop("max_gen_toks")
                for key in options.keys() - _SAMPLING:
                    raise UserError(f"gen_kwargs {key}: not supported{nearest(key, _SAMPLING)}")
                contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                # Contexts of similar length together need less padding.
                order = sorted(range(len(numbers)), key=lambda place: -len(contexts[place]))
                for begin in range(0, len(order), self.batch_size):
                    places = order[begin : begin + self.batch_size]
                    found = self._generate([contexts[place] for place in places], stops, length, options)
                    for place, tokens in zip(places, found, strict=True):
                        text = postprocess_generated_text(self.tok_decode(tokens), stops, None)
                        texts[numbers[place]] = text
                        self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
                    bar.update(len(places))
        return texts

    def _generate(
        self, contexts: Sequence[list[int]], stops: Sequence[str], length: int, sampling: dict[str, Any]
    ) -> list[list[int]]:
        """At most `length` tokens after each context, the last of which may complete a stop string."""
        room = max(1, self.max_length - length)
        # An empty context is the beginning of a document.
        prompts = [context[-room:] or [self.eot_token_id] for context in contexts]
        ends = [len(prompt) - 1 if context else -1 for prompt, context in zip(prompts, contexts, strict=True)]
        found: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(length):
            if not running:
                break
            rows, answers = zip(*(self._window(prompts[n], found[n], ends[n]) for n in running), strict=True)
            tokens = _choose(self.model.next_logits(rows, answers), sampling).tolist()
            for number, token in zip(running, tokens, strict=True):
                found[number].append(token)
            running = [
                n for n in running if found[n][-1] != self.eot_token_id and not self._stopped(found[n], stops)
            ]
        return found

    def _window(self, prompt: list[int], found: list[int], end: int) -> tuple[list[int], int]:
        """What is read of a text, and the index in it of the last token that the model answers, -1: none, as
        in `stlm generate`. `end`: that of the prompt's last token, -1 if it is no prompt."""
        text, context = prompt + found, self.max_length
        begin = window_begin(len(text), context)
        return text[begin:], max(-1, last_answered(end, begin, context, self.model.reads_prefixes) - begin)

    def _stopped(self, tokens: list[int], stops: Sequence[str]) -> bool:
        text = self.tok_decode(tokens)
        return any(stop and stop in text for stop in stops)


def _choose(logits_BV: Tensor, sampling: dict[str, Any]) -> Tensor:
    """The next token [B] of each row: the most probable one, or one drawn from torch's global generator.

    After the temperature, the `top_k` most probable tokens are kept, and of these the fewest whose
    probabilities sum to `top_p` (Holtzman et al. 2020).
    """
    temperature = float(sampling.get("temperature") or (1.0 if sampling.get("do_sample") else 0.0))
    if not sampling.get("do_sample") or temperature <= 0:
        temperature = 0.0
    choice = Sampling(
        temperature, max(0, int(sampling.get("top_k") or 0)) or None, float(sampling.get("top_p") or 1.0)
    )
    return choice.choose(logits_BV)
