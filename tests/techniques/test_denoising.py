"""Fill in the middle and the mixture of denoisers: how rows are written, read and counted, and infilling."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trained_runs import curve_of, last_checkpoint, same_weights, train_in_parts

from stlm.cli import main
from stlm.errors import UserError
from stlm.evaluation.encoding import RequestEncoder
from stlm.evaluation.interface import Request
from stlm.evaluation.token_model import TokenModel
from stlm.export.llama import export_llama
from stlm.files import read_json
from stlm.generation.infill import infill_tokens
from stlm.generation.tokens import TokenGenerator
from stlm.model.build import build_model
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_groups, training_flops_per_token
from stlm.model.documents import Documents
from stlm.model.llama import llama_weights
from stlm.model.prefixes import Prefixes, pair_flops
from stlm.model.rows import Rows
from stlm.model.transformer import Transformer
from stlm.study.load import load_study
from stlm.techniques.denoising import Denoiser, Denoising, cut, longest_part
from stlm.tokens.bpe import train_bpe
from stlm.tokens.config import DataConfig
from stlm.tokens.tokenizer import ByteTokenizer, Tokenizer
from stlm.training.checkpoints import load_checkpoint, save_checkpoint
from stlm.training.loop import train
from stlm.training.objective import Forward

V, L, EOT = 257, 32, 256
BYTES = ByteTokenizer()
SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24, "context": L}
CONFIG = ModelConfig(**{"vocab_size": V, "dropout": 0.0, **SIZES})
ENTRIES = {
    "psm": {"task": "infill"},
    "spm": {"task": "infill", "order": "spm"},
    "prefix": {"task": "prefix"},
    "short spans": {"task": "spans"},
    "many spans": {"task": "spans", "mean": 3, "rate": 0.5},
    "long spans": {"task": "spans", "mean": 12, "rate": 0.5},
}
each_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def technique_of(*entries: dict, markers: bool = False, config: ModelConfig = CONFIG) -> Denoising:
    """One that knows the text, as after `prepare`; the entries have equal shares of all rows."""
    mixture = tuple(Denoiser(**{"share": 1 / len(entries), **entry}) for entry in entries)
    technique = Denoising(mixture=mixture, markers=markers)
    technique.know(config, EOT)
    return technique


def random_model(*techniques: Denoising, **options: object) -> Transformer:
    torch.manual_seed(1)
    model = build_model(ModelConfig(**{**CONFIG.model_dump(), **options}), techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def text(*ends: int) -> np.ndarray:
    """A row [L + 1] of different tokens, with ends of text."""
    row = np.random.default_rng(sum(ends) + len(ends)).permutation(256)[: L + 1].astype(np.int64)
    row[list(ends)] = EOT
    return row


TEXTS = [text(), text(0), text(L), text(5, 20), text(0, 28), text(3, 4, 5, 30), text(1, L - 1)]


def restored(technique: Denoising, number: int, written: list[int]) -> list[int]:
    """The text of a document's part, from what was written of it."""
    entry, added = technique.mixture[number], technique._added
    if technique.markers:
        assert written[0] == added.entries + number
        written = written[1:]
    if entry.task == "prefix":
        return written
    if entry.task == "infill":
        pre, suf, mid = (written.index(added.first + place) for place in range(3))
        assert pre == 0 and sum(token >= V for token in written) == 3
        if entry.order == "spm":
            return written[mid + 1 :] + written[suf + 1 : mid]
        return written[1:suf] + written[mid + 1 :] + written[suf + 1 : mid]
    # A text with sentinels, and then each sentinel with what it stands for.
    second = len(written) - written[::-1].index(added.sentinels) - 1
    read, behind = written[:second], written[second:]
    places = [place for place, token in enumerate(behind) if token >= V] + [len(behind)]
    spans = {behind[begin]: behind[begin + 1 : end] for begin, end in pairwise(places)}
    assert list(spans) == [token for token in read if token >= V] and all(spans.values())
    return [one for token in read for one in (spans[token] if token >= V else [token])]


# How a part is written


@each_entry
@pytest.mark.parametrize("markers", [False, True])
def test_the_text_is_recovered_exactly(entry, markers):
    technique, numbers = technique_of(entry, markers=markers), np.random.default_rng(0)
    for length in range(2, technique._longest(technique.mixture[0], L, 0) + 1):
        own = list(range(length))
        part = technique.write(own, 0, numbers)
        assert restored(technique, 0, part.tokens) == own
        assert len(part.tokens) == technique.mixture[0].written(length) + markers
        assert max(part.tokens) < technique._added.end


def test_spans_have_the_share_and_the_mean_length_of_the_keys():
    entry = Denoiser(task="spans", share=1, mean=3, rate=0.15)
    assert entry.spans_of(400) == (60, 20) and entry.spans_of(2) == (1, 1)
    assert Denoiser(task="spans", share=1, mean=64, rate=0.5).spans_of(512) == (256, 4)
    numbers = np.random.default_rng(0)
    parts = [cut(60, 20, numbers) for _ in range(50)]
    assert all(sum(part) == 60 and len(part) == 20 and min(part) >= 1 for part in parts)
    assert (
        len({tuple(part) for part in parts}) == 50 and cut(1, 1, numbers) == [1] and cut(5, 1, numbers) == [5]
    )
    for room in range(2, 60):
        length = entry.longest(room)
        assert entry.written(length) <= room < entry.written(length + 1) or length < 2


def test_the_two_cuts_are_anywhere_in_the_text():
    technique, numbers = technique_of(ENTRIES["psm"]), np.random.default_rng(0)
    sizes = np.zeros((300, 3), int)
    for number in range(300):
        written = technique.write(list(range(20)), 0, numbers).tokens
        sizes[number] = np.diff([0, written.index(V + 1), written.index(V + 2), len(written)]) - 1
    assert (sizes.sum(axis=1) == 20).all() and (sizes.min(axis=0) == 0).all()
    assert sizes.mean(axis=0) == pytest.approx([20 / 3] * 3, abs=1)


# How a row is written


@each_entry
@pytest.mark.parametrize("markers", [False, True])
def test_a_row_is_rewritten_within_its_longest_document_and_counts_what_is_predicted(entry, markers):
    technique, numbers = technique_of(entry, markers=markers), np.random.default_rng(0)
    task, first = entry["task"], technique._added.first
    for original in TEXTS * 3:
        row = technique.compose(original, 0, numbers)
        part = longest_part(original, EOT)
        begin, stop = part.start, part.stop
        assert EOT not in original[begin:stop] and len(row.tokens) == len(row.targets) == L
        whole = np.append(row.tokens, row.targets[-1])
        assert np.array_equal(whole[:begin], original[:begin])
        end = begin + int(np.argmax(np.append(whole[begin:], EOT) == EOT))
        found = restored(technique, 0, whole[begin:end].tolist())
        assert found == original[begin : begin + len(found)].tolist() and len(found) >= 2
        rest = whole[end:]
        if len(found) == stop - begin:
            assert np.array_equal(rest, np.append(original[stop:], EOT)[: len(rest)])
        elif task != "prefix":
            # The document was cut, and is followed by what there is room for.
            assert len(rest) and rest[0] == EOT and len(rest) <= 3 + len(original) - stop
        # Exactly what is not read before it is predicted: no marker, and nothing of a visible part.
        visible = row.end - row.begin if row.end else 0
        assert (row.begin, visible > 0) == (begin if visible else 0, task != "infill")
        ends = set()
        if task == "spans":
            taken = [place for place in range(row.end, end) if whole[place] >= first]
            ends = {place - 1 for place in taken[1:]} | {end - 1}
        for place in range(L):
            following = whole[place + 1]
            padding = place + 1 >= end + len(original) - stop and stop < len(original) and place + 1 > end
            if place in ends:
                assert row.counted[place] and row.targets[place] == EOT
            elif following >= first or (visible and begin <= place + 1 < row.end):
                assert not row.counted[place] and row.targets[place] < V
            elif not padding:
                assert row.counted[place] == (place + 1 <= end or stop < len(original))
                assert row.targets[place] == following


def test_places_that_are_left_are_ends_of_text_that_do_not_count():
    """A token more may need another span, for which there is no room."""
    technique, numbers, filled = technique_of(ENTRIES["many spans"]), np.random.default_rng(0), 0
    for length in range(8, L + 1):
        row = technique.compose(text()[: length + 1], 0, numbers)
        after = technique.mixture[0].written(technique.mixture[0].longest(length))
        assert row.targets[after - 1] == EOT and row.counted[after - 1]
        assert (row.tokens[after:] == EOT).all() and (row.targets[after:] == EOT).all()
        assert not row.counted[after:].any()
        filled += after < length
    assert filled > 3


def test_rows_that_are_too_short_to_rewrite_are_plain():
    technique, numbers = technique_of(ENTRIES["psm"]), np.random.default_rng(0)
    row = np.array([EOT, 1] * 17)[: L + 1]
    found = technique.compose(row, 0, numbers)
    assert np.array_equal(found.tokens, row[:-1]) and found.counted.all() and found.end == 0


def changed(technique: Denoising, read: torch.Tensor, layout=None) -> Rows:
    torch.manual_seed(3)
    return technique.rows(Rows(read[:, :-1], read[:, 1:], layout), 1, 10)


def test_a_micro_batch_has_the_shares_of_the_mixture_and_the_layout_that_they_need():
    read = torch.from_numpy(np.stack(TEXTS + TEXTS[:1]))
    infill = technique_of({"task": "infill", "share": 0.5})
    rows = changed(infill, read)
    rewritten = (rows.tokens_BL >= V).any(dim=1)
    assert rewritten.sum() == 4 and rows.layout is None, "causal, with the kernels of causal rows"
    assert torch.equal(rows.tokens_BL[~rewritten], read[~rewritten, :-1])
    assert rows.counted_BL[~rewritten].all() and (~rows.counted_BL[rewritten]).any(dim=1).all()
    documents = Documents.of(read[:, :-1], EOT)
    within = changed(infill, read, documents)
    assert torch.equal(within.tokens_BL, rows.tokens_BL)
    assert torch.equal(within.layout.sees, Documents.of(rows.tokens_BL, EOT).sees)
    mixed = technique_of({"task": "prefix", "share": 0.25}, {"task": "spans", "share": 0.5})
    rows = changed(mixed, read, documents)
    assert isinstance(rows.layout, Prefixes) and (rows.layout.prefix_B > 0).sum() == 6
    assert torch.equal(rows.layout.positions, Documents.of(rows.tokens_BL, EOT).positions)
    given = Rows(read[:, :-1], read[:, 1:])
    for technique in (Denoising(mixture=()), technique_of({"task": "infill", "share": 1e-9})):
        torch.manual_seed(3)
        assert technique.rows(given, 1, 10) is given


@each_entry
@pytest.mark.parametrize("attention", ["across", "within"])
@torch.no_grad()
def test_no_counted_target_is_seen_where_it_is_predicted(entry, attention):
    technique = technique_of(entry, markers=True)
    model = random_model(technique, qkv_shift=True).eval()
    read = torch.from_numpy(np.stack(TEXTS[:5]))
    layout = None if attention == "across" else Documents.of(read[:, :-1], EOT)
    rows = changed(technique, read, layout)
    whole = model.hidden(rows.tokens_BL, rows.layout)
    seen_later = False
    for place in range(1, L):
        other = rows.tokens_BL.clone()
        other[:, place] = torch.where(other[:, place] < EOT, (other[:, place] + 1) % 256, other[:, place])
        moved = (model.hidden(other, rows.layout) - whole).abs().amax(dim=2) > 1e-5
        earlier = moved[:, :place]
        assert not (earlier & rows.counted_BL[:, :place]).any()
        seen_later = seen_later or bool(earlier.any())
        if attention == "within":
            document = (rows.tokens_BL == EOT).cumsum(dim=1)
            assert not (moved & (document != document[:, place : place + 1])).any()
    assert seen_later == (entry["task"] != "infill"), "visible prefixes are read in both directions"


def test_the_loss_is_the_mean_over_the_counted_targets():
    technique = technique_of(*ENTRIES.values())
    model = random_model(technique).train()
    read = torch.from_numpy(np.stack(TEXTS[:6]))
    rows = changed(technique, read)
    loss = Forward(model, *rows[:3], 1, 10, counted_BL=rows.counted_BL).next_token_loss()
    logits = model.head(model.hidden(rows.tokens_BL, rows.layout))
    expected = F.cross_entropy(logits[rows.counted_BL], rows.targets_BL[rows.counted_BL])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.added_embeddings.weight.grad.any()


# Costs and runs


def test_it_costs_vectors_and_the_pairs_that_are_seen(make_technique_run):
    entries = [ENTRIES[name] for name in ("psm", "prefix", "short spans", "many spans")]
    technique = technique_of(*entries, markers=True)
    run, plain = (make_technique_run(techniques=own) for own in ([technique], []))
    spans = technique.mixture[3].spans_of(technique.mixture[3].longest(L - 1))[1]
    model = build_model(run.model, [technique])
    assert parameter_groups(model)["added tokens"] == (3 + 4 + spans) * 32
    assert run.parameters.total == plain.parameters.total + (3 + 4 + spans) * 32
    # In rows of one document, by the mean over draws.
    seen = []
    for number in range(4):
        numbers = np.random.default_rng(0)
        rows = [technique.compose(text(), number, numbers) for _ in range(400)]
        seen.append(np.mean([(row.end - row.begin) ** 2 / 2 if row.end else 0 for row in rows]))
    extra = 3 * pair_flops(model) * np.mean(seen) / L
    assert technique.extra_flops_per_token(run) == pytest.approx(extra, rel=0.05)
    assert run.flops_per_token == pytest.approx(
        training_flops_per_token(plain.model) + technique.extra_flops_per_token(run)
    )


def test_an_empty_mixture_is_the_plain_run_to_the_bit(make_technique_run):
    neutral = Denoising(mixture=())
    assert neutral.neutral() and not Denoising().neutral()
    runs = [make_technique_run("plain", steps=2), make_technique_run("own", techniques=[neutral], steps=2)]
    for run in runs:
        train(run)
    assert curve_of(runs[0]) == curve_of(runs[1])
    plain, own = (load_checkpoint(last_checkpoint(run))[0].state_dict() for run in runs)
    assert plain.keys() == own.keys() and all(torch.equal(plain[name], own[name]) for name in plain)
    assert runs[0].flops_per_token == runs[1].flops_per_token


MIXTURE = tuple(
    Denoiser(share=0.25, **entry) for entry in ({"task": "infill"}, {"task": "prefix"}, {"task": "spans"})
)


@pytest.mark.parametrize("attention", ["across", "within"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(attention, make_technique_run):
    sharing = {"what": "all", "order": "one"}
    sizes = {
        "techniques": [Denoising(mixture=MIXTURE, markers=True)],
        "data": DataConfig(attention=attention),
        "model": {"layers": 2, "dropout": 0.1, "value_embeddings": 1, "sharing": sharing},
    }
    plain, stopped = (make_technique_run(name, accumulation=2, **sizes) for name in ("plain", "stopped"))
    train(plain)
    train_in_parts(stopped, 5)
    assert curve_of(plain) == curve_of(stopped)
    assert same_weights(plain, stopped)
    losses = [float(row["train_loss"]) for row in curve_of(plain)]
    assert losses[-1] < losses[0] and "train_next_token" not in curve_of(plain)[0]


# Infilling


def test_what_is_read_before_the_middle_is_written():
    generator = TokenGenerator(random_model(technique_of(ENTRIES["psm"])), ByteTokenizer())
    assert infill_tokens(generator, "run", "ab", "c") == [EOT, V, 97, 98, V + 1, 99, V + 2]
    technique = technique_of(ENTRIES["prefix"], ENTRIES["spm"], ENTRIES["psm"], markers=True)
    generator = TokenGenerator(random_model(technique), ByteTokenizer())
    assert infill_tokens(generator, "run", "ab", "c") == [EOT, V + 4, V, V + 1, 99, V + 2, 97, 98]
    # As training wrote it: the middle follows, and then an end of text.
    part = technique.write([97, 98, 1, 2, 99], 1, Cuts(2, 4))
    assert [EOT, *part.tokens] == [EOT, V + 4, V, V + 1, 99, V + 2, 97, 98, 1, 2]
    for other in (technique_of(ENTRIES["prefix"]), None):
        generator = TokenGenerator(random_model(*filter(None, [other])), ByteTokenizer())
        with pytest.raises(UserError, match=r"--prefix, --suffix: any was not trained to write"):
            infill_tokens(generator, "any", "ab", "c")


class Cuts:
    """Draws these cuts."""

    def __init__(self, *cuts: int) -> None:
        self.cuts = np.array(cuts)

    def integers(self, *_: int) -> np.ndarray:
        return self.cuts


def save(folder: Path, model: Transformer, tokenizer: Tokenizer = BYTES) -> Path:
    checkpoint = folder / "checkpoints" / "step-0000001"
    save_checkpoint(checkpoint, model, {"step": 1, "tokens": 1})
    tokenizer.save(checkpoint.parent / "tokenizer")
    return checkpoint


def test_the_command_writes_between_two_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = str(save(tmp_path, random_model(technique_of(ENTRIES["psm"])).eval()))
    texts = []
    for flags in ((), ("--no-cache",)):
        flags = ("--samples", "2", "--temperature", "1", *flags)
        assert main(["generate", checkpoint, "--prefix", "The hen", "--suffix", " ran.", *flags]) == 0
        texts.append(capsys.readouterr())
    assert texts[0] == texts[1]
    first, second = texts[0].out.split("---\n")
    for one in (first, second):
        assert one.startswith("The hen") and one.endswith(" ran.\n")
    assert first != second
    # 1 + 3 + 7 + 5 tokens are read, and so 17 more are drawn, unless one is the end of text.
    assert texts[0].err.count("context of 32 tokens is full") in (1, 2)
    # One side alone; and greedily, the most probable tokens of the model itself.
    assert main(["generate", checkpoint, "--suffix", "x", "--temperature", "0", "--tokens", "3"]) == 0
    told, model = capsys.readouterr(), load_checkpoint(Path(checkpoint))[0]
    read, expected = [EOT, V, V + 1, ord("x"), V + 2], b""
    for _ in range(3):
        best = int(model(torch.tensor([read]))[0, -1].argmax())
        if best == EOT:
            break
        expected, read = expected + bytes([best]), [*read, best]
    assert told.out == expected.decode(errors="replace") + "x\n" and not told.err

    for flags, message in (
        (["A prompt"], "PROMPT: expected without --prefix and --suffix"),
        (["--prompts", "file"], "--prompts: expected without --prefix"),
        (["--draft", "exit-1"], "--draft: expected without --prefix"),
        (["--rollback", "2"], "--rollback: expected without --prefix"),
        (["--readout", "masked"], "--readout: expected without --prefix"),
    ):
        for arguments in ([*flags, "--prefix", "The hen"], ["--prefix", "The hen", *flags]):
            assert main(["generate", checkpoint, *arguments]) == 2
            assert message in capsys.readouterr().err
    assert main(["generate", checkpoint, "--prefix", "x" * 20, "--suffix", "y" * 9]) == 2
    assert "with markers 33 tokens; expected at most 32" in capsys.readouterr().err
    assert main(["generate", checkpoint, "--prefix", "x" * 20, "--suffix", "y" * 8]) == 0
    capsys.readouterr()

    # Plain text is written as by any model, alone and with others.
    for flags in ((), ("--no-cache",)):
        assert main(["generate", checkpoint, "The hen", "--tokens", "40", *flags]) == 0
        texts.append(capsys.readouterr())
    assert texts[2] == texts[3]
    Path("prompts.txt").write_text("The hen\nAn owl\n")
    assert main(["generate", checkpoint, "--prompts", "prompts.txt", "--tokens", "40"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["prompt"] + line["text"] + "\n" == texts[2].out

    checkpoint = str(save(tmp_path / "plain", random_model().eval()))
    assert main(["generate", checkpoint, "--prefix", "a", "--suffix", "b"]) == 2
    assert "was not trained to write what stands between" in capsys.readouterr().err


@torch.no_grad()
def test_it_is_scored_packed_and_alone_and_exported_as_the_plain_model(tmp_path):
    tokenizer = train_bpe("bpe-270", ["The hen ran home to eat with nine owls."] * 3)
    size = {"vocab_size": tokenizer.vocab_size, "context": 48}
    model, plain = random_model(Denoising(mixture=MIXTURE), **size).eval(), random_model(**size).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    requests = [Request("The hen", f" {a}{b}") for a in ("ran", "ate") for b in ("", " home", " owls")]
    scores = []
    for one, packs in ((model, True), (model, False), (plain, True)):
        scorer = TokenModel(one, RequestEncoder(tokenizer))
        assert scorer.packs
        scorer.packs = packs
        scores.append([score.logprob for score in scorer.loglikelihoods(requests)])
    assert scores[0] == scores[2] and scores[0] == pytest.approx(scores[1], abs=1e-3)
    own, others = llama_weights(model), llama_weights(plain)
    assert own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)
    export_llama(save(tmp_path, model, tokenizer), tmp_path / "exported")
    assert read_json(tmp_path / "exported" / "config.json")["vocab_size"] == tokenizer.vocab_size


# Keys


def load(project, keys: str, more: str = ""):
    study = project / "params" / "smoke.yaml"
    variant = f"  denoised:\n    label: Denoised\n    techniques: {{denoising: {keys}}}\n{more}"
    study.write_text(study.read_text() + variant)
    return load_study("smoke")


def test_a_study_switches_it_on(project):
    keys = (
        "{mixture: [{task: infill, share: 0.5, order: spm}, {task: spans, share: 0.25, mean: 32, rate: 0.5}]}"
    )
    runs = load(project, keys).runs
    technique = runs["denoised"].techniques["denoising"]
    assert [entry.task for entry in technique.mixture] == ["infill", "spans"]
    assert runs["denoised"].parameters.total > runs["baseline"].parameters.total
    assert runs["denoised"].flops_per_token > runs["baseline"].flops_per_token


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ("{mixture: [{task: infil, share: 1}]}", "", r"denoising\.mixture\.0\.task: .*'infill'"),
        ("{mixture: [{task: infill}]}", "", r"mixture\.0\.share: this key is missing"),
        ("{mixture: [{task: prefix, share: 0}]}", "", r"mixture\.0\.share: .*found 0"),
        (
            "{mixture: [{task: prefix, share: 0.6}, {task: infill, share: 0.5}]}",
            "",
            r"mixture: found shares whose sum is 1.1, expected at most 1",
        ),
        (
            "{mixture: [{task: prefix, share: 1, order: spm}]}",
            "",
            r"mixture\.0: order: found spm with task: prefix, expected null: only task: infill has one",
        ),
        (
            "{mixture: [{task: infill, share: 1, rate: 0.5}]}",
            "",
            r"mixture\.0: rate: found 0.5 with task: infill, expected null: only task: spans has one",
        ),
        (
            "{}",
            "    model: {context: 4}\n",
            r"denoising\.mixture\.0: found task: infill with model.context: 4, which has no room for two "
            r"tokens with their markers; expected at least 5",
        ),
        ("{}", "    tokenizer: spaces\n    model: {bytes: {}}\n", "does not support byte-level models"),
        ("{}", "    training: {start_from: baseline}\n", "does not support weights of another run"),
        ("{}", "    training: {compile: true}\n", "does not support torch.compile"),
    ],
)
def test_what_does_not_fit_is_refused(keys, more, message, project):
    with pytest.raises(UserError, match=message):
        load(project, keys, more)
