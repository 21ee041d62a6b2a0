"""Several tokens at once: the losses of further heads, their cost, and drafts that they make."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import (
    curve_of,
    same_weights,
    train_in_parts,
    train_in_two_processes,
    weights_of,
)

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.ahead import AheadSpeculator, ahead_drafts
from stlm.generation.batch import Batch
from stlm.generation.find import own_drafts
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.speculation import Drafting, Speculation, Statistics
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, parameter_groups
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.inference import why_not
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.multi_token import FurtherHeads, MultiToken
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import save_checkpoint
from stlm.training.curve import validate
from stlm.training.loop import Trainer, train
from stlm.training.memory import training_memory
from stlm.training.objective import Forward, Objective, total
from stlm.training.optimizers import build_optimizer

OPTIONS = {
    "plain": {},
    "learned": {"positions": "learned", "norm": "layernorm"},
    "recipe": {
        "value_embeddings": 1,
        "qkv_shift": True,
        "qk_norm": True,
        "logit_softcap": 4.0,
        "tied": False,
    },
    "shared": {"sharing": {"what": "all", "order": "one"}, "lora": {"rank": 3}, "embedding_rank": 9},
}
LAYERS, WIDTH, CONTEXT, EOT = 3, 32, 16, 256
KINDS = ("parallel", "chained")
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY = Sampling(temperature=0)
# Of a text: the window moves twice.
TOKENS = 24


def config(**options: object) -> ModelConfig:
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": 4, "kv_heads": 2, "ffn_width": 40, "context": CONTEXT}
    return ModelConfig(**{"vocab_size": 257, **sizes, **options})


def new_model(*techniques: MultiToken, **options: object) -> Transformer:
    torch.manual_seed(0)
    return build_model(config(**options), techniques)


def random_model(*techniques: MultiToken, **options: object) -> Transformer:
    """A model whose predictions depend on all of its parts."""
    model = new_model(*techniques, **options)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.05 if name.endswith("bias") else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * scale)
    return model.eval()


def rows(count: int = 3) -> torch.Tensor:
    """Tokens [B, L + 1] of some documents."""
    read = torch.randint(256, (count, CONTEXT + 1), generator=torch.Generator().manual_seed(2))
    for row, places in enumerate([(7,), (0, 1, 2, 12), (), (4, 9, 16)][:count]):
        read[row, list(places)] = EOT
    return read


def forward(
    model: Transformer, read: torch.Tensor, within: bool = False, step: int = 1, steps: int = 1, **more
):
    layout = Documents.of(read[:, :-1], EOT) if within else None
    return Forward(model, read[:, :-1], read[:, 1:], layout, step, steps, **more)


# Off is off


@each_option
def test_one_token_at_a_time_is_the_plain_model(options):
    technique = MultiToken(heads=1)
    assert technique.neutral() and not MultiToken().neutral()
    plain, own = random_model(**options).train(), random_model(technique, **options).train()
    assert list(plain.state_dict()) == list(own.state_dict())
    parts = technique.objective(forward(own, rows()))
    assert parts == {} and technique.figures == ()
    expected = plain.loss(rows()[:, :-1], rows()[:, 1:])
    found = forward(own, rows()).next_token_loss()
    assert torch.equal(found, expected)
    expected.backward()
    found.backward()
    for one, other in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@each_option
@each_kind
def test_further_heads_change_nothing_but_training(options, kind):
    """The model's weights are those of its seed; what reads the model alone does not see the heads."""
    technique = MultiToken(heads=3, kind=kind)
    plain, own = new_model(**options), new_model(technique, **options)
    weights = own.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert all(name.startswith("ahead.") for name in weights.keys() - plain.state_dict().keys())
    for model in (plain, own):
        model.eval()
    assert torch.equal(own(rows()[:, :-1]), plain(rows()[:, :-1]))
    assert forward_flops(own, CONTEXT) == forward_flops(plain, CONTEXT)
    assert why_not(own) == why_not(plain)
    requests = [Request("the cat", f" {end}") for end in ("sat", "sat down", "ran")]
    scores, texts = [], []
    for model in (plain, own):
        scorer = TokenModel(model, RequestEncoder(ByteTokenizer()))
        assert scorer.packs
        scores.append([one.logprob for one in scorer.loglikelihoods(requests)])
        generator = TokenGenerator(model, ByteTokenizer())
        written = Batch(generator, Sampling()).write(["a", "né"], [1, 2], 6)
        texts.append([row.drawn for row in written])
    assert scores[0] == scores[1] and texts[0] == texts[1]


def test_the_main_loss_stays_the_next_tokens():
    model = random_model(MultiToken(heads=3)).train()
    given = forward(model, rows())
    MultiToken(heads=3).objective(given)
    loss = model.loss(rows()[:, :-1], rows()[:, 1:])
    assert given.next_token_loss().item() == pytest.approx(loss.item(), rel=1e-6)


# Losses


def naive(
    model: Transformer, technique: MultiToken, read: torch.Tensor, within: bool
) -> dict[str, list[float]]:
    """Each head's losses, by a loop over texts and positions: a text is a row, or a document with its end."""
    found: dict[str, list[float]] = {f"ahead_{k}": [] for k in range(2, technique.heads + 1)}
    heads: FurtherHeads = model.ahead
    for row in read:
        begins = [0]
        if within:
            begins = sorted({0, *(row[:-1] == EOT).nonzero().flatten().tolist()})
        for begin, end in pairwise([*begins, CONTEXT]):
            text = row[begin : end + 1]
            state_1MD = model.residuals(text[None, :-1], after=range(LAYERS))[
                technique.trunk_blocks(LAYERS) - 1
            ]
            for k in range(2, technique.heads + 1):
                count = len(text) - k
                if count < 1:
                    break
                inputs = state_1MD[:, :count]
                if technique.kind == "chained":
                    inputs = torch.stack(
                        [_joined(model, heads, k, inputs[0, n], text[n + k - 1]) for n in range(count)]
                    )[None]
                rope = None
                if model.config.positions == "rope":
                    rope = model.cos_LE[:count, None], model.sin_LE[:count, None]
                stream_1MD = _alone(heads.blocks[k - 2], inputs, rope)
                if technique.kind == "chained":
                    state_1MD = stream_1MD
                for n in range(count):
                    logits = model.head(model.finish(stream_1MD[0, n]))
                    found[f"ahead_{k}"].append(-logits.log_softmax(dim=-1)[text[n + k]].item())
    return found


def _joined(model, heads, k, state_D, token) -> torch.Tensor:
    join, vector_D = heads.joins[k - 2], model.embedding.weight[token]
    if model.embedding_up is not None:
        vector_D = vector_D @ model.embedding_up
    return join.projection.weight @ torch.cat([join.state_norm(state_D), join.embedding_norm(vector_D)])


def _alone(block, x_1MD, rope) -> torch.Tensor:
    """The block's output, each position from the row up to it."""
    from stlm.model.layout import CausalRows

    last = []
    for length in range(1, x_1MD.shape[1] + 1):
        angles = None if rope is None else tuple(table[:length] for table in rope)
        last.append(block(x_1MD[:, :length], angles, CausalRows(length))[:, -1])
    return torch.stack(last, dim=1)


@each_option
@each_kind
def test_losses_are_those_of_a_plain_loop(options, kind):
    technique = MultiToken(heads=3, kind=kind, weight=(0.5, 2.0))
    model = random_model(technique, **options)
    with torch.no_grad():
        for within in (False, True):
            expected = naive(model, technique, rows(), within)
            found = technique.objective(forward(model, rows(), within))
            assert list(found) == list(expected) == ["ahead_2", "ahead_3"]
            for weight, (name, losses) in zip((0.5, 2.0), expected.items(), strict=True):
                mean = sum(losses) / len(losses)
                assert found[name].item() == pytest.approx(weight * mean, rel=1e-4)
    if kind == "parallel":
        # The same with the kernels of training.
        trained = technique.objective(forward(model.train(), rows(), True))
        for name, value in found.items():
            assert trained[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_a_trunk_of_fewer_blocks_is_read():
    technique = MultiToken(trunk=1)
    model = random_model(technique)
    with torch.no_grad():
        losses = naive(model, technique, rows(), False)["ahead_2"]
        found = technique.objective(forward(model, rows()))["ahead_2"].item()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert MultiToken().trunk_blocks(5) == 4 and MultiToken(kind="chained").trunk_blocks(5) == 5
    assert MultiToken().trunk_blocks(1) == 1


@each_kind
def test_a_short_document_gives_no_target_and_a_head_may_have_none(kind):
    """Rows whose documents have two tokens: no head sees beyond them."""
    technique = MultiToken(heads=4, kind=kind)
    model = random_model(technique).train()
    read = rows(2)
    read[:, ::2] = EOT
    parts = technique.objective(forward(model, read, within=True))
    assert parts["ahead_2"] > 0 and parts["ahead_3"] == parts["ahead_4"] == 0
    total(parts).backward()
    assert technique.objective(forward(model, read))["ahead_4"] > 0


def test_processes_that_share_rows_average_to_the_mean_over_all_targets():
    technique = MultiToken(heads=3)
    model, read = random_model(technique), rows(4)
    whole = technique.objective(forward(model, read, within=True))
    halves, counts = [], []
    for part in (read[:1], read[1:]):
        technique.objective(forward(model, part, True, sum_over_rows=lambda own: counts.append(own) or own))
    for part in (read[:1], read[1:]):
        halves.append(technique.objective(forward(model, part, True, sum_over_rows=lambda _: sum(counts))))
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)
    assert counts[0][1] != counts[1][1] / 3, "the halves have other shares of targets"


@each_kind
def test_a_head_sees_no_later_token(kind):
    """Head k of a chain reads the k - 1 tokens after its position, a parallel one none of them."""
    technique = MultiToken(heads=3, kind=kind)
    model, read, place = random_model(technique), rows(1), 9
    other = read.clone()
    other[0, place] = (other[0, place] + 1) % 256
    streams = []
    with torch.no_grad():
        for one in (read, other):
            x_BLD = model.residuals(one[:, :-1], after=[model.ahead.trunk - 1])[0]
            streams.append(dict(model.ahead.states(model, x_BLD, one[:, 1:], None, 3)))
    for k in (2, 3):
        first = place - (k - 1 if kind == "chained" else 0)
        same = (streams[0][k] == streams[1][k]).all(dim=-1)[0].tolist()
        assert same == [True] * first + [False] * (len(same) - first)


def test_a_chained_head_with_weights_set_by_hand():
    """Blocks add nothing and the matrix takes the embedding alone: head k says what the model would."""
    technique = MultiToken(heads=3, kind="chained")
    model = by_hand(technique)
    read = rows(2)
    with torch.no_grad():
        parts = technique.objective(forward(model, read))
        for k in (2, 3):
            logits = model(read[:, k - 1 : CONTEXT])
            expected = F.cross_entropy(logits.flatten(0, 1), read[:, k:].flatten())
            assert parts[f"ahead_{k}"].item() == pytest.approx(expected.item(), rel=1e-5)


def by_hand(technique: MultiToken) -> Transformer:
    model = random_model(technique)
    with torch.no_grad():
        for block in (*model.blocks, *model.ahead.blocks):
            block.attention.out.weight.zero_()
            block.ffn.down.weight.zero_()
        for join in model.ahead.joins:
            join.embedding_norm.weight.fill_(1)
            join.projection.weight.copy_(torch.eye(2 * WIDTH)[WIDTH:])
    return model


def test_gradients_reach_heads_and_trunk_but_not_the_next_tokens_own_block():
    technique = MultiToken(heads=3)
    model = random_model(technique, tied=False).train()
    total(technique.objective(forward(model, rows()))).backward()
    reached = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    assert reached == [True, True, False]
    for module in (*model.ahead.blocks, model.norm, model.output):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# Curricula


def test_the_number_of_tokens_grows_or_falls():
    forward_, reverse = (MultiToken(heads=4, curriculum=one) for one in ("forward", "reverse"))
    assert [forward_.tokens_at(step, 8) for step in range(1, 9)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [reverse.tokens_at(step, 8) for step in range(1, 9)] == [4, 4, 3, 3, 2, 2, 1, 1]
    half = [one.model_copy(update={"share": 0.5}) for one in (forward_, reverse)]
    assert [half[0].tokens_at(step, 8) for step in range(1, 9)] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert [half[1].tokens_at(step, 8) for step in range(1, 9)] == [4, 3, 2, 1, 1, 1, 1, 1]
    assert {MultiToken(heads=4).tokens_at(step, 8) for step in range(1, 9)} == {4}
    for technique in (forward_, reverse, *half):
        for steps in (4, 7, 50):
            counted = [technique.tokens_at(step, steps) for step in range(1, steps + 1)]
            for k in technique.further:
                assert len(technique.steps_of(k, steps)) == sum(n >= k for n in counted)


def test_heads_without_a_loss_are_not_computed(monkeypatch):
    technique = MultiToken(heads=3, curriculum="reverse")
    model, computed = random_model(technique), []
    for number, block in enumerate(model.ahead.blocks, 2):
        block.register_forward_hook(lambda *_, number=number: computed.append(number))
    for step, expected in ((1, [2, 3]), (2, [2]), (3, [])):
        parts = technique.objective(forward(model, rows(), step=step, steps=3))
        assert computed == expected and list(parts) == ["ahead_2", "ahead_3"]
        assert [name for name, value in parts.items() if value > 0] == [f"ahead_{k}" for k in expected]
        computed.clear()


# Cost


@each_kind
@pytest.mark.parametrize("options", [{}, {"embedding_rank": 9, "tied": False}], ids=str)
def test_flops_are_torchs_but_for_the_upper_half_of_attention(
    kind, options, make_technique_run, torch_operations
):
    technique = MultiToken(heads=3, kind=kind)
    sizes = {"context": CONTEXT, "layers": LAYERS, **options}
    run = make_technique_run(model=sizes, techniques=[technique])
    model = build_model(run.model, [technique]).eval()  # then attention is torch's, whose FLOPs it counts
    objective = Objective(run)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total(objective(objective.forward(model, rows(1), None, 1))).backward()
    upper_half = 3 * 2 * WIDTH * (LAYERS * CONTEXT**2 + (CONTEXT - 1) ** 2 + (CONTEXT - 2) ** 2)
    assert run.flops_per_token * CONTEXT == counter.get_total_flops() - upper_half
    plain = run.model_copy(update={"techniques": {}})
    extra = technique.extra_flops_per_token(run)
    assert run.flops_per_token == plain.flops_per_token + extra
    # Each of three numbers of tokens for a third of the steps: 2 / 3 of head 2, 1 / 3 of head 3.
    grown = technique.model_copy(update={"curriculum": "forward"})
    run = make_technique_run(model=sizes, techniques=[grown], steps=9)
    heads = [model.ahead.head_flops(model, k, CONTEXT) * 3 / CONTEXT for k in (2, 3)]
    assert sum(heads) == pytest.approx(extra)
    assert grown.extra_flops_per_token(run) == pytest.approx(heads[0] * 2 / 3 + heads[1] / 3)


@each_kind
def test_parameters_are_a_group_that_scoring_does_not_use(kind):
    technique, options = MultiToken(heads=3, kind=kind), OPTIONS["shared"]
    plain, own = new_model(**options), new_model(technique, **options)
    groups = parameter_groups(own)
    further = groups.pop("further heads")
    assert groups == parameter_groups(plain)
    assert further == sum(p.numel() for p in own.ahead.parameters())
    counts = parameter_counts(config(**options), (technique,))
    assert counts.total == sum(p.numel() for p in own.parameters())
    assert counts.active == sum(p.numel() for p in plain.parameters()) == counts.total - further


def test_memory_is_about_that_of_as_many_further_layers(make_technique_run):
    for technique, further in ((MultiToken(heads=3), 2), (MultiToken(heads=3, curriculum="forward"), 2)):
        run, deep = (
            make_technique_run(techniques=[technique]),
            make_technique_run(model={"layers": 4 + further}),
        )
        own, other = (training_memory(one, "float32", False, 4).sequence for one in (run, deep))
        assert 0.9 * other < own < 1.1 * other
    assert technique.extra_bytes(run) == 2 * 4 * 257 * 32


def test_matrices_of_heads_are_trained_as_the_blocks(make_technique_run):
    training, model = make_technique_run(optimizer="muon").training, new_model(MultiToken(kind="chained"))
    kinds = {
        id(p): group["matrices"]
        for group in build_optimizer(model, training).param_groups
        for p in group["params"]
    }
    for parameter in (*model.ahead.parameters(), *model.blocks.parameters()):
        assert kinds[id(parameter)] == (parameter.dim() == 2)
    assert not kinds[id(model.embedding.weight)]


# Drafts


def speculator(model: Transformer, last: int, in_c: bool) -> AheadSpeculator:
    if not in_c:
        model.norm.register_forward_hook(lambda *_: None)
    found = AheadSpeculator(model, ByteTokenizer(), last)
    found.start("")
    assert (found._inference is not None) == in_c == (found._blocks_in_c is not None)
    return found


def expected_draft(own: AheadSpeculator, k: int) -> torch.Tensor:
    """Head k's logits after the last verified token, from one pass over the window without a cache."""
    model = own.transformer
    window = own._tokens[own._begin :]
    known = torch.tensor([[*window, *own._drafted]])
    with torch.no_grad():
        x_1LD = model.residuals(known[:, : len(window)], after=[model.ahead.trunk - 1])[0]
        x_1LD = F.pad(x_1LD, (0, 0, 0, k - 1))  # the last verified token does not see what follows it
        targets_1L = torch.cat([known[:, 1:], known[:, :1]], dim=1)
        states = dict(model.ahead.states(model, x_1LD, targets_1L, None, k))
        return model.head(model.finish(states[k][0, -1]))


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize(
    "options", [{}, OPTIONS["recipe"], OPTIONS["shared"]], ids=["plain", "recipe", "shared"]
)
@each_kind
def test_drafts_are_the_heads_predictions_whatever_was_rejected(kind, options, in_c):
    if in_c and why_not(random_model()) is not None:
        pytest.skip("no kernels")
    model = random_model(MultiToken(heads=4, kind=kind), **options)
    own = speculator(model, 4, in_c)
    own.start("ab c d")
    # Drafted tokens, and how many of them are asked for and rejected; the window moves within the text.
    for symbols, rejected in (
        *(([65, 200, 7, 31], 3), ([90, 12], 1), ([3], 0), ([5, 6, 77], 0), ([8, 9, 1, 2], 2)),
        *(([40], 0), ([41], 0), ([66, 67], 1), ([68, 69, 70, 71], 1), ([72, 73], 0)),
    ):
        symbols = symbols[: max(1, own.room)]
        for k, symbol in enumerate(symbols[:-1] or symbols, 2):
            found = own.draft(symbol)
            torch.testing.assert_close(found, expected_draft(own, k), atol=2e-4, rtol=1e-3)
        own.verify(symbols)
        if rejected := min(rejected, len(symbols) - 1):
            own.reject(rejected)
    assert own.dropped > 0
    for symbol in (1, 2, 3):
        assert own.draft(symbol) is not None
    assert own.draft(4) is None, "there is no fifth head"


@each_kind
def test_greedy_text_is_the_models_for_every_number_of_heads_and_length(kind):
    model = random_model(MultiToken(heads=4, kind=kind), **OPTIONS["recipe"])
    alone = TokenGenerator(model, ByteTokenizer())
    expected = list(islice(one_by_one(alone, alone.start("né"), GREEDY, torch.Generator()), TOKENS))
    assert ahead_drafts(model) == {"ahead-2": 2, "ahead-3": 3, "ahead-4": 4}
    for last in (2, 3, 4):
        own = AheadSpeculator(model, ByteTokenizer(), last)
        for length in (1, 2, 9):
            text, statistics = drafted(own, Drafting(length), GREEDY)
            assert text == expected, (last, length)
            assert 0 < statistics.drafted <= min(length, last - 1) * statistics.passes
    assert drafted(speculator(model, 4, in_c=False), Drafting(9), GREEDY)[0] == expected


def drafted(own: AheadSpeculator, drafting: Drafting, sampling: Sampling) -> tuple[list[int], Statistics]:
    speculation = Speculation(own, drafting, sampling, torch.Generator().manual_seed(5))
    return list(islice(speculation.symbols(own.start("né"), TOKENS), TOKENS)), speculation.statistics


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=50)], ids=["greedy", "sampled"])
def test_heads_that_say_what_the_model_would_are_always_accepted(sampling):
    model = by_hand(MultiToken(heads=3, kind="chained"))
    for last in (2, 3):
        statistics = drafted(AheadSpeculator(model, ByteTokenizer(), last), Drafting(8), sampling)[1]
        assert statistics.acceptance == 1 and statistics.drafted > 5


# Training


def test_a_run_is_trained_validated_and_resumed(make_technique_run, capsys):
    technique = MultiToken(heads=3, kind="chained", curriculum="forward", share=0.75)
    sizes = {"techniques": [technique], "data": DataConfig(attention="within"), "accumulation": 2}
    sizes |= {"model": {"layers": 2, "dropout": 0.1}}
    run, stopped = make_technique_run("run", **sizes), make_technique_run("stopped", **sizes)
    train(run)
    train_in_parts(stopped, 5)
    assert same_weights(run, stopped) and curve_of(run) == curve_of(stopped)
    for row in curve_of(run):
        parts = [float(row[f"train_{name}"]) for name in ("next_token", "ahead_2", "ahead_3")]
        assert float(row["train_loss"]) == pytest.approx(sum(parts), abs=3e-6)
        step = int(row["step"])
        # Two steps of each number; a row has the mean over two steps.
        assert [part > 0 for part in parts[1:]] == [step > 2, step > 4]
    record = read_json(run.folder / "train.json")
    assert record["flops"] == run.tokens * run.flops_per_token
    capsys.readouterr()
    texts = []
    for draft in ((), ("--draft", "ahead-2"), ("--draft", "ahead-3", "--draft-length", "9")):
        asked = ["generate", "test/run", "1 2", "--tokens", "12", "--temperature", "0", *draft]
        assert main(asked) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert main([*asked[:-4], "--draft", "ahead-4"]) == 2
    told = capsys.readouterr().err
    assert "--draft ahead-4: test/run has no such draft (did you mean 'ahead-" in told
    assert "expected an exit (exit-N) or further heads (ahead-N) of the model" in told
    assert own_drafts("test/run") == ["ahead-2", "ahead-3"]
    # The heads' validation losses, by a loop over the text.
    trainer = Trainer(run)
    found = validate(trainer.setup, trainer.curve.validation).row
    model, sums = trainer.setup.model.eval(), {2: [0.0, 0], 3: [0.0, 0]}
    for inputs, targets, mask in trainer.curve.validation.batches(4):
        for row in range(len(inputs)):
            read = torch.from_numpy(inputs[row : row + 1]), torch.from_numpy(targets[row : row + 1])
            with torch.no_grad():
                x_1LD = model.residuals(read[0])[-1]
                for k, x_1SD in model.ahead.states(model, x_1LD, read[1], None, 3):
                    log_p = model.head(model.finish(x_1SD))[0].log_softmax(dim=-1)
                    for place in range(log_p.shape[0]):
                        if mask[row, place + k - 1]:
                            sums[k][0] -= log_p[place, targets[row, place + k - 1]].item()
                            sums[k][1] += 1
    for k, (loss, count) in sums.items():
        assert found[f"val_ahead_{k}"] == pytest.approx(loss / count, rel=1e-5)
        assert f"val_ahead_{k}" in curve_of(run)[-1]


def test_a_run_of_one_token_is_the_plain_one(make_technique_run):
    plain, own = (
        make_technique_run(name, techniques=techniques, steps=4, model={"layers": 2})
        for name, techniques in (("plain", ()), ("own", (MultiToken(heads=1),)))
    )
    for run in (plain, own):
        train(run)
    assert same_weights(plain, own) and curve_of(plain) == curve_of(own)


def test_weights_pass_from_and_to_runs_without_heads(make_technique_run):
    """Heads are new in a run that starts from one without, and are left behind by one that starts from it."""
    recipe = {
        "steps": 2,
        "warmup_steps": 1,
        "model": {"layers": 2},
        "learning_rate": 1e-6,
        "min_learning_rate": 1e-7,
    }
    before = make_technique_run("before", **(recipe | {"learning_rate": 1e-2}))
    own = make_technique_run("own", techniques=[MultiToken()], start_from="before", **recipe)
    after = make_technique_run("after", start_from="own", **recipe)
    for run in (before, own, after):
        train(run)
    weights = [weights_of(run) for run in (before, own, after)]
    assert weights[0].keys() == weights[2].keys() == {n for n in weights[1] if not n.startswith("ahead.")}
    for name, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)


def test_export_leaves_the_heads_out(tmp_path):
    tokenizer = train_bpe("bpe-270", ["The hen ran home to eat with nine owls."] * 3)
    files = []
    for name, techniques in (("plain", ()), ("own", (MultiToken(heads=3, kind="chained"),))):
        checkpoint = tmp_path / name / "checkpoints" / "step-0000001"
        save_checkpoint(checkpoint, new_model(*techniques, vocab_size=270), {"step": 1, "tokens": 1})
        tokenizer.save(checkpoint.parent / "tokenizer")
        export_llama(checkpoint, tmp_path / name / "llama")
        files.append(load_file(tmp_path / name / "llama" / "model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    sizes = {"techniques": [MultiToken(heads=3)], "data": DataConfig(attention="within")}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(two)[name], atol=2e-5, rtol=1e-3)


# Keys


def load(project, keys: str, more: str = ""):
    text = (project / "params" / "smoke.yaml").read_text()
    variant = f"  ahead:\n    label: Ahead\n    techniques: {{multi_token: {keys}}}\n{more}"
    (project / "params" / "smoke.yaml").write_text(text + variant)
    return load_study("smoke")


def test_it_is_loaded_from_a_study(project):
    found = load(project, "{heads: 3, weight: [1, 0.5], curriculum: reverse, share: 0.5}").runs["ahead"]
    (technique,) = found.techniques.values()
    assert technique == MultiToken(heads=3, weight=(1.0, 0.5), curriculum="reverse", share=0.5)
    assert [technique.weight_of(k) for k in (2, 3)] == [1, 0.5] and MultiToken(weight=2).weight_of(2) == 2
    assert MultiToken.model_validate_json(technique.model_dump_json()) == technique


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("{trunk: 99}", r"multi_token\.trunk: found 99, expected at most the \d+ of model.layers"),
        ("{heads: 100000}", r"heads: found 100000, expected at most model.context, \d+"),
        ("{heads: 0}", r"heads: .*found 0"),
        ("{weight: [1, 1]}", r"weight: found 2 of them, expected 1, as .* with heads: 2, or one number"),
        ("{weight: 0}", r"weight: found 0.0, expected numbers above 0; without further heads, set heads: 1"),
        (
            "{heads: 1, curriculum: forward}",
            r"curriculum: found forward with heads: 1, .* expected null, or at least 2",
        ),
        ("{share: 0.5}", r"share: found 0.5 without a curriculum; expected 1, or curriculum: forward"),
        (
            "{heads: 8, curriculum: reverse, share: 0.001}",
            r"curriculum: found reverse, by which head 2 of heads: 8 is trained at none of the \d+ steps; "
            r"expected fewer heads, a larger share than 0.001 or more training.steps",
        ),
        ("{head: 2}", r"head: no such key \(did you mean 'heads'"),
    ],
)
def test_what_does_not_fit_is_refused(keys, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("    training: {compile: true}\n", "does not support torch.compile"),
    ],
)
def test_what_it_does_not_support_is_refused(more, message, project):
    with pytest.raises(UserError, match=f"techniques.multi_token {message}"):
        load(project, "{}", more)
