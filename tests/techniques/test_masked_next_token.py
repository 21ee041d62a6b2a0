"""Masked next-token prediction: what is masked, read and counted, and scores in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts, train_in_two_processes

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.config import EvaluationConfig
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.evaluate import evaluate_run
from stlm.evaluation.interface import Request
from stlm.evaluation.pseudo_likelihood import PseudoLikelihood, _Text
from stlm.evaluation.readouts import readouts_of
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json, read_record
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_groups, training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.flops import forward_flops
from stlm.model.llama import llama_weights
from stlm.model.prefixes import Prefixes
from stlm.model.rows import Rows, drawn_shares
from stlm.model.transformer import Transformer
from stlm.report.schema import EvaluationRecord
from stlm.study.load import load_study
from stlm.techniques.masked_next_token import MaskedNextToken
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.loop import train
from stlm.training.objective import Forward

V, L, EOT = 257, 16, 256
MASK = V
SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24, "context": L}


def technique_of(**keys: object) -> MaskedNextToken:
    """One that knows the text, as after `prepare`; masked tokens read the mask unless `keys` differ."""
    technique = MaskedNextToken(**{"random": 0.0, "kept": 0.0, **keys})
    technique._eot, technique._vocabulary = EOT, V
    return technique


def random_model(*techniques: MaskedNextToken, **options: object) -> Transformer:
    torch.manual_seed(1)
    model = build_model(ModelConfig(**{"vocab_size": V, "dropout": 0.0, **SIZES, **options}), techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def text(rows: int = 4) -> torch.Tensor:
    """Rows [B, L + 1], with an end of text in each."""
    read = torch.randint(0, 256, (rows, L + 1), generator=torch.Generator().manual_seed(2))
    read[:, 6] = EOT
    return read


def changed(technique: MaskedNextToken, read: torch.Tensor, layout=None, step: int = 1) -> Rows:
    torch.manual_seed(3)
    return technique.rows(Rows(read[:, :-1], read[:, 1:], layout), step, 10)


# What is masked


def test_rows_are_shared_out_as_evenly_as_whole_numbers_allow():
    torch.manual_seed(0)
    for rows, shares in ((4, [0.5]), (5, [0.3, 0.2]), (1, [0.25]), (3, [1.0]), (3, [0.0])):
        drawn = torch.stack([drawn_shares(rows, shares) for _ in range(400)])
        for number, share in enumerate(shares):
            counts = (drawn == number).sum(dim=1)
            assert int(rows * share) <= counts.min() and counts.max() <= -int(-rows * share // 1)
            torch.testing.assert_close(
                (drawn == number).float().mean(dim=0), torch.full((rows,), share), atol=0.1, rtol=0
            )


def test_masked_tokens_are_the_counted_targets_and_all_else_is_as_it_was():
    technique, read = technique_of(share=0.5, rate=0.4), text(8)
    rows = changed(technique, read)
    masked_rows = rows.layout.prefix_B > 0
    assert masked_rows.sum() == 4 and set(rows.layout.prefix_B.tolist()) == {0, L}
    assert torch.equal(rows.targets_BL, read[:, 1:])
    replaced = rows.tokens_BL == MASK
    assert torch.equal(rows.tokens_BL[~replaced], read[:, :-1][~replaced])
    assert not replaced[~masked_rows].any() and rows.counted_BL[~masked_rows].all()
    # A masked token's target is that of the position before it; the last one's token is no input.
    assert torch.equal(rows.counted_BL[masked_rows][:, :-1], replaced[masked_rows][:, 1:])
    assert not replaced[:, 0].any() and not replaced[:, 6].any(), "no row's first token, and no end of text"
    assert rows.counted_BL[masked_rows].any(dim=1).all()
    # Without a masked row nothing changes, not even the layout and with it the kernels.
    given = Rows(read[:, :-1], read[:, 1:])
    torch.manual_seed(3)
    assert technique_of(share=1e-9).rows(given, 1, 10) is given
    assert technique_of(share=0).rows(given, 1, 10) is given


def test_shares_of_tokens_spans_and_replacements_are_those_of_the_keys():
    technique = technique_of(rate=0.3, final_rate=0.1, span=3, random=0.2, kept=0.1)
    assert [technique.rate_at(step, 5) for step in (1, 3, 5)] == pytest.approx([0.3, 0.2, 0.1])
    torch.manual_seed(0)
    read = torch.randint(0, 256, (200, 400))
    chosen, inputs = technique.masked(read, 0.3)
    assert chosen[:, 1:].float().mean() == pytest.approx(0.3, abs=0.01)
    own, mask = inputs == read, inputs == MASK
    assert mask[chosen].float().mean() == pytest.approx(0.7, abs=0.02)
    assert own[chosen].float().mean() == pytest.approx(0.1 + 0.2 / 256, abs=0.02)
    # Random tokens are all but the end of text, wherever it is in the vocabulary.
    technique._eot = 100
    _, others = technique.masked(read.masked_fill(read == 100, 101), 0.3)
    assert not (others == 100).any() and (others == 99).any() and (others == 256).any()
    # Spans have two tokens on average, and 1 / (1 - rate) of them follow one another.
    runs = chosen[:, 1:].sum() / (chosen[:, 1:] & ~chosen[:, :-1]).sum()
    assert runs == pytest.approx(2 / 0.7, abs=0.1)
    single, _ = technique_of(span=1).masked(read, 0.3)
    assert single[:, 1:].sum() / (single[:, 1:] & ~single[:, :-1]).sum() == pytest.approx(1 / 0.7, abs=0.05)
    # At the smallest rate, one span of each row.
    fewest, _ = technique.masked(read, 1e-6)
    assert (fewest.sum(dim=1) >= 1).all() and (fewest.sum(dim=1) <= 3).all()


# The loss


def test_the_parts_are_the_cross_entropies_of_both_kinds_of_rows_by_their_shares():
    technique, read = technique_of(share=0.25), text()
    model = random_model(technique).train()
    rows = changed(technique, read)
    (row,) = rows.layout.prefix_B.nonzero().flatten().tolist()
    assert rows.layout.prefix_B.tolist() == [L * (number == row) for number in range(4)]
    forward = Forward(model, *rows[:3], 1, 10, counted_BL=rows.counted_BL)
    parts = technique.objective(forward)
    logits = model.head(model.hidden(rows.tokens_BL, rows.layout))
    own = rows.counted_BL[row]
    expected = F.cross_entropy(logits[row][own], read[row, 1:][own]) / 4
    torch.testing.assert_close(parts["masked"], expected)
    others = [number for number in range(4) if number != row]
    plain = model.loss(read[others, :-1], read[others, 1:])
    torch.testing.assert_close(parts["next_token"], plain * 3 / 4)
    sum(parts.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.added_embeddings.weight.grad.any()
    # Only one kind of rows.
    for share, name in ((1.0, "masked"), (1e-9, "next_token")):
        rows = changed(technique_of(share=share), read)
        parts = technique.objective(Forward(model, *rows[:3], 1, 10, counted_BL=rows.counted_BL))
        assert {key for key, part in parts.items() if part != 0} == {name}
    assert torch.equal(parts["next_token"], model.loss(read[:, :-1], read[:, 1:]))


@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_masked_token_is_hidden_and_a_visible_one_is_seen_from_both_sides(attention):
    technique, read = technique_of(share=0.5, rate=0.3), text()
    model = random_model(technique, qkv_shift=True).eval()
    layout = None if attention == "across" else Documents.of(read[:, :-1], EOT)

    def logits(read: torch.Tensor) -> torch.Tensor:
        rows = changed(technique, read, layout)
        return (
            model(rows.tokens_BL)
            if rows.layout is None
            else model.head(model.hidden(rows.tokens_BL, rows.layout))
        )

    rows, whole = changed(technique, read, layout), logits(read).detach()
    masked_rows = rows.layout.prefix_B > 0
    for place in range(L):
        if place == 6:
            continue
        other = read.clone()
        other[:, place] = (other[:, place] + 1) % 256
        moved = (logits(other).detach() - whole).abs().amax(dim=2) > 1e-5
        first, last = (0, L) if attention == "across" else (0, 6) if place < 6 else (6, L)
        for row in range(4):
            if rows.tokens_BL[row, place] == MASK:
                expected = [False] * L
            elif masked_rows[row]:
                expected = [first <= query < last for query in range(L)]
            else:
                expected = [place <= query < last for query in range(L)]
            assert moved[row].tolist() == expected, (place, row)


# Neutral, costs


def test_no_masked_rows_are_the_plain_run_to_the_bit(make_technique_run):
    neutral = MaskedNextToken(share=0)
    assert neutral.neutral() and not MaskedNextToken().neutral()
    runs = [make_technique_run("plain", steps=2), make_technique_run("own", techniques=[neutral], steps=2)]
    for run in runs:
        train(run)
    assert curve_of(runs[0]) == curve_of(runs[1])
    plain, own = (load_checkpoint(last_checkpoint(run))[0].state_dict() for run in runs)
    assert plain.keys() == own.keys() and all(torch.equal(plain[name], own[name]) for name in plain)
    assert readouts_of(build_model(runs[1].model, [neutral])) == {}
    assert runs[0].flops_per_token == runs[1].flops_per_token


def test_it_costs_one_vector_and_what_torch_counts(make_technique_run, torch_operations):
    technique = technique_of(share=0.5, rate=0.4, final_rate=0.4)
    run, plain = (make_technique_run(techniques=own, steps=1, warmup_steps=0) for own in ([technique], []))
    assert run.parameters.total == plain.parameters.total + 32
    model = build_model(run.model, [technique]).train()
    assert parameter_groups(model)["added tokens"] == 32
    B, context = 16, run.model.context
    read = torch.randint(0, 256, (B, context + 1))
    rows = changed(technique, read)
    with FlopCounterMode(display=False) as counter:
        parts = technique.objective(Forward(model, *rows[:3], 1, 1, counted_BL=rows.counted_BL))
        sum(parts.values()).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    # Fused attention computes masked pairs, too: those that are seen are counted, as of causal attention.
    config = run.model
    pairs = 12 * config.layers * config.heads * config.head_width
    seen = pairs * rows.layout.sees.sum().item()
    diagonal = pairs * B / 2 * context / 2  # causal rows are counted as exactly half of the square
    total = (products + seen - diagonal) / (B * context)
    assert run.flops_per_token == pytest.approx(total, rel=0.03)
    # To the last one, at the share of tokens that was drawn.
    counted = rows.counted_BL.sum().item() / (B * context)
    head = 3 * forward_flops(model.output, 1)
    expected = technique.extra_flops_per_token(run) + head * (counted - 0.5 - 0.5 * 0.4)
    assert total == pytest.approx(training_flops_per_token(plain.model) + expected, rel=1e-9)


# Scores in both directions


def by_hand(model: Transformer, tokens: list[int], first: int) -> float:
    total = 0.0
    for place in range(first, len(tokens)):
        read = torch.tensor([tokens])
        read[0, place] = MASK
        hidden = model.hidden(read, Prefixes(torch.tensor([len(tokens)]), len(tokens)))
        total += float(model.head(hidden)[0, place - 1].log_softmax(dim=-1)[tokens[place]])
    return total


ITEMS = [("", "the cat ran"), ("a dog", " was not"), ("", "a"), ("the", " cat ran"), ("", "the cat ran")]


@torch.no_grad()
def test_each_token_is_masked_in_turn_and_predicted_from_all_others():
    technique = MaskedNextToken()
    model = random_model(technique).eval()
    readout = readouts_of(model)["masked"]
    encoder = RequestEncoder(ByteTokenizer())
    for batch_tokens in (None, 30):
        scorer = readout.language_model(encoder, "cpu", "float32", batch_tokens)
        done = []
        requests = [Request(*item, whole=whole) for item in ITEMS for whole in (False, True)]
        scores = scorer.loglikelihoods(requests, done.append, greedy=True)
        assert sum(done) == len(requests)
        for request, score in zip(requests, scores, strict=True):
            tokens = [EOT, *(request.context + request.continuation).encode()]
            first = 1 if request.whole else 1 + len(request.context)
            assert score.logprob == pytest.approx(by_hand(model, tokens, first), abs=1e-3)
            assert score.n_tokens == len(tokens) - first and not score.truncated
    assert scores[0].logprob == scores[8].logprob and scores[0].greedy is False
    # The most probable of all tokens, and another one.
    best = int(
        model.head(model.hidden(torch.tensor([[EOT, MASK]]), Prefixes(torch.tensor([2]), 2)))[0, 0].argmax()
    )
    for token in (best, best - 1):
        scored = scorer._score([_Text(np.array([EOT, token]), 1, False)], [(0, 1)], greedy=True)
        assert scored[1].tolist() == [token == best]
    half = PseudoLikelihood(model, MASK, encoder, precision="bfloat16")
    found = [score.logprob for score in half.loglikelihoods(requests)]
    assert found == pytest.approx([score.logprob for score in scores], rel=0.1)
    assert half.precise.precision == "float32" and half.precise.precise is half.precise
    with pytest.raises(NotImplementedError, match="no probabilities"):
        scorer.document_loglikelihoods([[1, 2]])


@torch.no_grad()
def test_texts_beyond_the_context_lose_their_beginning():
    model = random_model(MaskedNextToken()).eval()
    scorer = readouts_of(model)["masked"].language_model(
        RequestEncoder(ByteTokenizer()), "cpu", "float32", None
    )
    long, short = "It was a dark and stormy night", "It was a dark and stormy"
    (score,) = scorer.loglikelihoods([Request("", long)])
    assert score.truncated and score.n_tokens == L - 1
    assert score.logprob == pytest.approx(by_hand(model, list(long.encode()[-L:]), 1), abs=1e-3)
    (score,) = scorer.loglikelihoods([Request(long[:-4], long[-4:])])
    assert score.n_tokens == 4 and score.truncated
    # Of an item, all options lose as many tokens.
    pair = scorer.loglikelihoods([Request("", one, whole=True, item=7) for one in (long, short)])
    lost = len(long) + 1 - L
    assert [one.n_tokens for one in pair] == [L - 1, len(short) - lost]
    tokens = [EOT, *short.encode()][-L:]
    first = lost + 1 - (len(short) + 1 - L)
    assert pair[1].truncated and pair[1].logprob == pytest.approx(by_hand(model, tokens, first), abs=1e-3)


def test_what_scoring_a_string_costs(torch_operations):
    model = random_model(MaskedNextToken()).eval()
    readout = readouts_of(model)["masked"]
    scorer = readout.language_model(RequestEncoder(ByteTokenizer()), "cpu", "float32", None)
    with FlopCounterMode(display=False) as counter:
        scorer.loglikelihoods([Request("", "x" * (L - 1))])
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    config = model.config
    attention = 4 * config.layers * config.heads * config.head_width * L**2
    # The first token, an end of text, is not scored. Of the last block, the positions that are not scored
    # skip what follows attention; the estimate has it.
    last = model.blocks[-1]
    skipped = (L - 1) * (forward_flops(last.ffn, 1) + forward_flops(last.attention.out, 1))
    per_row = products / (L - 1) + skipped + attention
    assert readout.flops(L) == pytest.approx(L * per_row, rel=1e-9)


# Runs


KEYS = {"share": 0.5, "rate": 0.3, "scored": ("synthetic_pairs",)}


def test_a_run_learns_both_and_is_scored_and_written_with(make_technique_run, capsys, tmp_path):
    run = make_technique_run(techniques=[MaskedNextToken(**KEYS)], steps=16, watch_every=8)
    train(run)
    rows = curve_of(run)
    for row in rows:
        together = float(row["train_next_token"]) + float(row["train_masked"])
        assert float(row["train_loss"]) == pytest.approx(together, abs=3e-6)
    for part in ("train_next_token", "train_masked"):
        assert float(rows[-1][part]) < float(rows[0][part])
    record = read_json(run.folder / "train.json")
    assert record["flops"] == run.tokens * run.flops_per_token
    evaluate_run(run, EvaluationConfig(benchmarks=["synthetic_pairs", "synthetic_choice"]))
    found = read_json(run.folder / "evaluation.json")
    own, last = found["readouts"]["masked"], found["checkpoints"]["step-0000016"]
    assert own["perplexity"] is None and list(own["benchmarks"]) == ["synthetic_pairs"]
    assert own["benchmarks"]["synthetic_pairs"]["items"] == last["benchmarks"]["synthetic_pairs"]["items"]
    assert own["benchmarks"]["synthetic_pairs"]["modes"].keys() == {"harness", "paper"}
    assert own["parameters"] == run.parameters.total
    assert own["flops_per_token"] > 32 * run.flops_per_token / 6
    assert read_record(run.folder / "evaluation.json", EvaluationRecord).readouts["masked"].perplexity is None

    texts = []
    for flags in ((), ("--no-cache",)):
        assert main(["generate", "test/run", "1 2 3", "--tokens", "40", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    Path("prompts.txt").write_text("1 2 3\n4 hens\n")
    assert main(["generate", "test/run", "--prompts", "prompts.txt", "--tokens", "40"]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert together[0]["prompt"] + together[0]["text"] + "\n" == texts[0]
    assert main(["generate", "test/run", "1", "--readout", "masked"]) == 2
    assert "--readout masked: " in (told := capsys.readouterr().err) and "writes none" in told


@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(attention, make_technique_run):
    sharing = {"what": "all", "order": "one"}
    model = {"layers": 2, "dropout": 0.1, "value_embeddings": 1, "sharing": sharing}
    sizes = {"techniques": [MaskedNextToken(**KEYS)], "data": DataConfig(attention=attention), "model": model}
    plain, stopped = (make_technique_run(name, accumulation=2, **sizes) for name in ("plain", "stopped"))
    train(plain)
    train_in_parts(stopped, 5)
    assert curve_of(plain) == curve_of(stopped)
    assert same_weights(plain, stopped)


@pytest.mark.slow
def test_two_processes_train_as_one(make_technique_run):
    sizes = {"techniques": [MaskedNextToken(**KEYS)], "accumulation": 2}
    one, two = make_technique_run("one", **sizes), make_technique_run("two", **sizes)
    train(one)
    train_in_two_processes(two)
    ours, theirs = (load_checkpoint(last_checkpoint(run))[0].state_dict() for run in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=2e-5, rtol=1e-3)


@torch.no_grad()
def test_it_is_scored_packed_and_alone_and_exported_as_the_plain_model(tmp_path):
    tokenizer = train_bpe("bpe-270", ["The hen ran home to eat with nine owls."] * 3)
    size = {"vocab_size": tokenizer.vocab_size, "context": 48}
    model, plain = random_model(MaskedNextToken(), **size).eval(), random_model(**size).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    requests = [Request("The hen", f" {a}{b}") for a in ("ran", "ate") for b in ("", " home", " owls")]
    scores = []
    for one, packs in ((model, True), (model, False), (plain, True)):
        scorer = TokenModel(one, RequestEncoder(tokenizer))
        assert scorer.packs
        scorer.packs = packs
        scores.append([score.logprob for score in scorer.loglikelihoods(requests)])
    assert scores[0] == scores[2] and scores[0] == pytest.approx(scores[1], abs=1e-3)
    # The mask is no part of a model of plain text, and left out.
    own, others = llama_weights(model), llama_weights(plain)
    assert own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    tokenizer.save(checkpoint.parent / "tokenizer")
    export_llama(checkpoint, tmp_path / "exported")
    assert read_json(tmp_path / "exported" / "config.json")["vocab_size"] == tokenizer.vocab_size


def load(project, keys: str, more: str = ""):
    study = project / "params" / "smoke.yaml"
    variant = f"  masked:\n    label: Masked\n    techniques: {{masked_next_token: {keys}}}\n{more}"
    study.write_text(study.read_text() + variant)
    return load_study("smoke")


def test_a_study_switches_it_on(project):
    runs = load(project, "{share: 0.25}").runs
    assert runs["masked"].techniques == {"masked_next_token": MaskedNextToken(share=0.25)}
    technique = runs["masked"].techniques["masked_next_token"]
    assert technique.benchmarks == ("blimp", "synthetic_pairs"), "those of them that the study has"
    assert MaskedNextToken(scored=()).benchmarks == ()
    assert runs["masked"].parameters.total == runs["baseline"].parameters.total + runs["masked"].model.width


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ("{share: 1.5}", "", r"masked_next_token\.share: .*found 1.5"),
        ("{rate: 0}", "", r"masked_next_token\.rate: .*found 0"),
        ("{span: 0}", "", r"masked_next_token\.span: .*found 0"),
        ("{random: 0.6, kept: 0.5}", "", r"kept: found 0.5 with random: 0.6, expected at most 0.4"),
        ("{scored: [blimb]}", "", r"scored: found 'blimb', .*did you mean 'blimp'"),
        (
            "{scored: [synthetic_pairs, blimp]}",
            "",
            r"masked_next_token\.scored: found 'blimp', expected of evaluation.benchmarks "
            r"\(choices: last_word, synthetic_choice, synthetic_pairs\)",
        ),
        (
            "{scored: [steps_arithmetic_written]}",
            "",
            r"scored: found 'steps_arithmetic_written', before whose options a model writes a text, which "
            r"reads from left to right; expected another benchmark \(did you mean 'steps_arithmetic'",
        ),
        ("{scored: [last_word, last_word]}", "", r"scored: found 'last_word' twice, expected each name once"),
        ("{}", "    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("{}", "    training: {start_from: baseline}\n", "does not support weights of another run"),
        ("{}", "    training: {compile: true}\n", "does not support torch.compile"),
    ],
)
def test_what_does_not_fit_is_refused(keys, more, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, more)
