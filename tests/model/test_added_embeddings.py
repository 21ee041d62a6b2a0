"""Tokens beyond the vocabulary, which are read and never predicted."""

from __future__ import annotations

import pytest
import torch

from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.token_model import TokenModel
from stlm.generation.sampling import Sampling
from stlm.generation.tokens import TokenGenerator
from stlm.model.cache import Cache
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_groups, total_counts
from stlm.model.inference import Inference, why_not
from stlm.model.transformer import Transformer
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.config import TrainingConfig
from stlm.training.optimizers import build_optimizer
from stlm.training.watch import EMBEDDING, layer_of

V, L = 257, 12
OPTIONS = {
    "plain": {},
    "factorized, values": {"embedding_rank": 9, "tied": False, "value_embeddings": 2, "qkv_shift": True},
    "sinusoidal": {"positions": "sinusoidal"},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def random_model(added: int = 0, **options: object) -> Transformer:
    torch.manual_seed(1)
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24, "context": L}
    model = Transformer(ModelConfig(**{"vocab_size": V, "dropout": 0.0, **sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    if added:
        assert model.add_tokens(added) == V
        with torch.no_grad():
            model.added_embeddings.weight.copy_(torch.randn(added * 16))
    return model.eval()


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(2))


@each_option
def test_text_without_them_is_read_as_before_to_the_bit(options):
    plain, model, read = random_model(**options), random_model(3, **options), tokens()
    assert torch.equal(plain(read), model(read))
    losses = [one.train().loss(read[:, :-1], read[:, 1:]) for one in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, own[name].grad), name
    assert not own["added_embeddings.weight"].grad.any()


@each_option
def test_each_is_read_with_its_own_vector_and_none_is_predicted(options):
    model, read = random_model(3, **options), tokens(1)
    read[0, 4], read[0, 7] = V + 2, V
    logits = model(read)
    assert logits.shape == (1, L, V)
    # A vector of the vocabulary with the same embedding is read alike, where there are no value embeddings.
    if "embedding_rank" not in options:
        twin = random_model(**options)
        with torch.no_grad():
            for place in (4, 7):
                twin.embedding.weight[place] = model.added_embeddings.weight.view(3, 16)[read[0, place] - V]
            same = read.clone()
            same[0, 4], same[0, 7] = 4, 7
            found = twin.head(twin.hidden(same))
        others = [token for token in range(V) if token not in (4, 7)]  # the head is tied
        torch.testing.assert_close(found[..., others], logits[..., others])
    model.hidden(read).square().sum().backward()
    gradient = model.added_embeddings.weight.grad.view(3, 16)
    assert gradient.abs().amax(dim=1).gt(0).tolist() == [True, False, True]
    with pytest.raises(IndexError):
        model(torch.full((1, 2), V + 3))
    with pytest.raises(AssertionError, match="added already"):
        model.add_tokens(1)


def test_they_are_counted_apart_and_trained_as_gains_are():
    plain, model = random_model(), random_model(5)
    groups = parameter_groups(model)
    assert groups.pop("added tokens") == 5 * 16 and groups == parameter_groups(plain)
    counts, others = total_counts(parameter_groups(model)), total_counts(groups)
    assert counts.embedding - others.embedding == 5 * 16 and counts.non_embedding == others.non_embedding
    for group in build_optimizer(model, TrainingConfig(steps=1, warmup_steps=0)).param_groups:
        if any(p is model.added_embeddings.weight for p in group["params"]):
            assert group["weight_decay"] == 0
    assert layer_of("added_embeddings.weight") == EMBEDDING


@each_option
def test_a_cache_reads_them_and_passes_in_c_go_on_from_it(options):
    model, read = random_model(3, **options), tokens(1)
    read[0, 0], read[0, 2] = V + 1, V
    with torch.inference_mode():
        whole = model.hidden(read)
        cache = Cache.of(model, 1, torch.device("cpu"))
        parts = [model.hidden(part, cache.extend(part.shape[1])) for part in read.split([3, 1, 8], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-3)
    texts = []
    for cached in (True, False):
        generator, numbers = TokenGenerator(model, ByteTokenizer(), cached), torch.Generator().manual_seed(5)
        generator.restart([256, V, 65, V + 2])
        logits = generator.read([], last=1)[0]
        torch.testing.assert_close(logits, model(torch.tensor([[256, V, 65, V + 2]]))[0, -1])
        texts.append([])
        while len(texts[-1]) < 8:
            texts[-1].append(int(Sampling(temperature=1.0).choose(logits, numbers)) % 256)
            logits = generator.next(texts[-1][-1])
    assert texts[0] == texts[1]
    if why_not(model) is None:  # where there are kernels
        inference = Inference.of(model)
        with pytest.raises(AssertionError, match="beyond the vocabulary"):
            inference.read([V], [0], [0], Cache.of(model, 1, torch.device("cpu")), [0])


def test_text_is_scored_as_before():
    plain, model = random_model(), random_model(3)
    scores = [
        TokenModel(one, RequestEncoder(ByteTokenizer())).document_loglikelihoods([list(b"The cat ran home.")])
        for one in (plain, model)
    ]
    assert scores[0] == scores[1]
