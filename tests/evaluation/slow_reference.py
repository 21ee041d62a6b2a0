"""The slow way to score, nothing shared: full logits, one request at a time, rules as lm_eval has them."""

import torch

from stlm.evaluation.interface import Request


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm_eval 0.4's `TemplateLM._encode_pair`, and its prefix token for an empty context."""
    if context == "":
        return [tokenizer.eot], tokenizer.encode(continuation)
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole = tokenizer.encode(context + continuation)
    n_context = len(tokenizer.encode(context))
    return whole[:n_context], whole[n_context:]


@torch.no_grad()
def logprob_of_rest(model, tokens: list[int], first: int) -> float:
    """log P(tokens[first:] | tokens[:first]), from full logits."""
    logprobs = torch.log_softmax(model(torch.tensor([tokens[:-1]]))[0].double(), dim=-1)
    return sum(float(logprobs[i - 1, tokens[i]]) for i in range(first, len(tokens)))


def harness(model, tokenizer, request: Request) -> tuple[float, int, bool]:
    """The score of one request in harness mode, cut from the left as lm_eval's `HFLM` does."""
    context, continuation = encode_pair(tokenizer, request.context, request.continuation)
    tokens = context + continuation
    kept = tokens[-(model.config.context + 1) :]
    first = max(1, len(kept) - len(continuation))
    return logprob_of_rest(model, kept, first), len(kept) - first, len(kept) < len(tokens)


def whole(model, tokenizer, request: Request) -> tuple[float, int]:
    """The summed log-probability of a whole string that fits the context."""
    tokens = tokenizer.encode(request.context + request.continuation)
    eot = tokenizer.eot
    if request.context.strip() == "":
        return logprob_of_rest(model, [eot, *tokens], 1), len(tokens)
    first = logprob_of_rest(model, [eot, tokens[0]], 1)
    return first + (logprob_of_rest(model, tokens, 1) if len(tokens) > 1 else 0.0), len(tokens)
