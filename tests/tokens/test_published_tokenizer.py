"""hf:NAME: ids are those of transformers, every text comes back, other kinds of tokenizers are refused."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from awkward_texts import EDGES, random_texts
from published_sample import ABSENT, EOT, SPECIAL, reference, write_model
from raw_samples import stories
from tokenizers import Regex, pre_tokenizers

from stlm.corpora.fetch import fetch
from stlm.errors import UserError
from stlm.study.catalogues import load_models
from stlm.tokens import vocabulary
from stlm.tokens.published import UTF8, PublishedTokenizer, fetched_tokenizer
from stlm.tokens.reduced import reduced_tokenizer
from stlm.tokens.tokenizer import chunker_of, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]

TEXTS = [
    *EDGES,
    "<|im_start|>user\n<|endoftext|><|im_end|>",
    "1234  5\t6 ½²Ⅷ٣𑗠 7\n\n 8",
    "\x04a\x1d\U00040000\U0007ffff",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
    "don't 'S I'LL x'1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("raw") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> PublishedTokenizer:
    return fetched_tokenizer("hf:tiny", folder)


def check(tokenizer: PublishedTokenizer, path: Path, texts: list[str]) -> int:
    """Compare ids with those of the tokenizer.json at `path`; how many texts have bytes that it loses."""
    of = reference(path)
    lost = 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids
        if set(text.encode()) & set(ABSENT):
            lost += 1
        else:
            assert ids == of(text), ascii(text)
    return lost


def test_ids_are_those_of_transformers(tiny: PublishedTokenizer, folder: Path) -> None:
    assert tiny.is_fast
    assert (tiny.name, tiny.vocab_size, tiny.eot, tiny.dtype) == ("hf:tiny", 500, 0, np.uint16)
    lost = check(tiny, folder / "tokenizer.json", TEXTS + random_texts(300) + stories(30, seed=5))
    assert lost > 2
    assert len(tiny.encode(stories(1)[0])) < len(stories(1)[0].encode()) / 2


def test_ids_of_all_kinds_of_characters(tiny: PublishedTokenizer, folder: Path) -> None:
    """All numerals, all white space and some of each other category, between letters, spaces and digits."""
    draw, kinds = random.Random(3), {}
    for code in range(0x110000):
        kinds.setdefault(unicodedata.category(chr(code)), []).append(code)
    del kinds["Cs"]
    codes = [code for kind, some in kinds.items() if kind[0] in "NZ" for code in some]
    codes += [code for some in kinds.values() for code in draw.sample(some, min(len(some), 50))]
    codes += [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]  # numerals since Unicode 17
    assert len(codes) > 2500
    check(tiny, folder / "tokenizer.json", [f"a{c}{c}b  {c} {c}1{c}" for c in map(chr, codes)])


def test_bytes_without_a_token_are_written_with_special_ones(tiny: PublishedTokenizer, folder: Path) -> None:
    """The published tokenizer loses them; text has no other way to write the tokens that stand for them."""
    assert reference(folder / "tokenizer.json")("\x04\x1d") == []
    stand_ins = [SPECIAL.index(token) for token in ("<file>", "<name>", "<issue>")]
    assert [tiny.encode(text)[0] for text in ("\x04", "\x1d", "\U00040000")] == stand_ins
    assert "<|im_end|>" in tiny.vocabulary.tokens and "<issue>" not in tiny.vocabulary.tokens
    assert tiny.decode_bytes([1, stand_ins[0]]) == b"<|im_start|>\x04"


def test_the_stored_tokenizer_is_the_same(tiny: PublishedTokenizer, tmp_path: Path) -> None:
    """Also to the libraries that load its tokenizer.json, which then lose nothing either."""
    tiny.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PublishedTokenizer) and loaded.is_fast
    assert (loaded.name, loaded.vocab_size, loaded.eot) == (tiny.name, tiny.vocab_size, 0)
    assert loaded.files == tiny.files
    of = reference(tmp_path / "tokenizer.json")
    for text in TEXTS + random_texts(100):
        assert loaded.encode(text) == tiny.encode(text) == of(text)
    for ids in (loaded.parent_ids, loaded.first_pieces):
        assert ids.tolist() == list(range(500))


def test_a_lone_surrogate_is_refused(tiny: PublishedTokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        tiny.encode("a\ud800")


def test_white_space_that_exhausts_the_regular_expression(tiny: PublishedTokenizer) -> None:
    """A run before a numeral or the end is one piece, otherwise its last character is in the next."""
    for follows in ("", "5", "½", "b", "\u3000."):
        short, long = (f"a{' ' * n}{follows}" for n in (5_000, 1_200_000))
        assert tiny.decode(tiny.encode(long)) == long
        n = min(10, len(tiny.encode(short)))
        assert tiny.encode(long + "c" * 9)[-n:] == tiny.encode(short + "c" * 9)[-n:]


@pytest.mark.parametrize(
    ("pre_tokenizer", "fast"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)]), False),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            False,
        ),
    ],
    ids=["gpt2", "digits together", "split"],
)
def test_other_pre_tokenizations(tmp_path: Path, pre_tokenizer, fast: bool) -> None:
    folder = write_model(tmp_path / "other", pre_tokenizer=pre_tokenizer)
    other = fetched_tokenizer("hf:other", folder)
    assert other.is_fast == fast
    check(other, folder / "tokenizer.json", TEXTS + random_texts(50) + stories(5))
    other.save(tmp_path / "stored")
    assert load_tokenizer(tmp_path / "stored").encode(TEXTS[3]) == other.encode(TEXTS[3])


def _reversed_ids(content: dict) -> None:
    """The same merges, whose tokens have ids that fall."""
    vocabulary = content["model"]["vocab"]
    made = ["".join(merge) for merge in content["model"]["merges"]]
    vocabulary |= dict(zip(made, sorted((vocabulary[token] for token in made), reverse=True), strict=True))


def _unreachable(content: dict) -> None:
    """`vw` and `wx` come first, so that `vwx` is never made: tiktoken would take the whole piece."""
    content["model"]["vocab"] |= {"vw": 500, "wx": 501, "yz": 502, "vwx": 503}
    content["model"]["merges"] += [["v", "w"], ["w", "x"], ["y", "z"], ["v", "wx"]]


@pytest.mark.parametrize("change", [_reversed_ids, _unreachable])
def test_tiktoken_is_not_used_where_it_writes_other_tokens(tmp_path: Path, change) -> None:
    folder = write_model(tmp_path / "other", change=change)
    other = fetched_tokenizer("hf:other", folder)
    assert not other.is_fast
    check(other, folder / "tokenizer.json", [*TEXTS, *stories(10), "vwx vwxyz"])


def _unreachable_whole(content: dict) -> None:
    _unreachable(content)
    content["model"]["ignore_merges"] = True


def _set(key: str, value: object):
    def change(content: dict) -> None:
        *sections, last = key.split(".")
        for section in sections:
            content = content[section]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", {"type": "Unigram", "vocab": []}), r"model\.type: 'Unigram'; expected 'BPE'"),
        (_set("model.byte_fallback", True), r"model\.byte_fallback: True"),
        (_set("model.dropout", 0.1), r"model\.dropout: 0\.1"),
        (_set("normalizer", {"type": "NFC"}), "normalizer: changes texts"),
        (
            _set("pre_tokenizer", {"type": "Metaspace"}),
            r"pre_tokenizer: \['Metaspace'\]; expected 'ByteLevel'",
        ),
        (_set("pre_tokenizer", None), r"pre_tokenizer: \[\]"),
        (_set("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space false"),
        (
            _set(
                "pre_tokenizer",
                {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}],
                },
            ),
            "WhitespaceSplit: not one that keeps",
        ),
        (
            lambda content: content["added_tokens"][0].update(content="<s>"),
            "no special token '<|endoftext|>'",
        ),
        (lambda content: content["added_tokens"][1].update(special=False), "'<|im_start|>' is not special"),
        (
            lambda content: content.update(added_tokens=content["added_tokens"][:3]),
            r"no token for 3 bytes that texts may have, first 0x04, and only 2 special",
        ),
        (lambda content: content["model"]["merges"].pop(), "is made by no merge"),
        (lambda content: content["model"]["merges"].append(["a", "水"]), "'水' is no token"),
        (
            lambda content: content["model"]["vocab"].update({"ab水": 500}),
            "character that stands for no byte",
        ),
        (lambda content: content["model"]["vocab"].update(more=800), "no token has id 500"),
        (_unreachable_whole, "ignore_merges: true, and 'vwx' is not what"),
        (lambda content: content.pop("model"), "expected 'BPE'"),
        (lambda content: content["model"].pop("merges"), "not as the library tokenizers writes it"),
    ],
)
def test_what_is_no_byte_level_bpe_is_refused(tmp_path: Path, change, message: str) -> None:
    folder = write_model(tmp_path / "other", change=change)
    with pytest.raises(UserError, match=message) as error:
        fetched_tokenizer("hf:other", folder)
    assert str(folder / "tokenizer.json") in str(error.value)


def test_a_model_that_was_not_fetched_or_was_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; run: stlm fetch other"):
        fetched_tokenizer("hf:other", tmp_path / "data" / "raw" / "other")
    folder = write_model(tmp_path / "data" / "raw" / "other")
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"tokenizer\.json: (damaged|changed).*run: stlm fetch other"):
        fetched_tokenizer("hf:other", folder)


def test_byte_level_models_are_refused(tiny: PublishedTokenizer) -> None:
    with pytest.raises(UserError, match="hf:tiny cuts no chunks for byte-level models"):
        chunker_of(tiny)


def test_merges_may_be_written_as_lines(tiny: PublishedTokenizer, tmp_path: Path) -> None:
    """As the library wrote them before 0.20."""

    def lines(content: dict) -> None:
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]

    folder = write_model(tmp_path / "tiny", change=lines)
    assert fetched_tokenizer("hf:tiny", folder).files == tiny.files


def test_the_stored_file_is_that_of_the_library(tiny: PublishedTokenizer) -> None:
    """`tokenizers` reads it, and writes it again with the same content."""
    content = tiny.files["tokenizer.json"].decode()
    written = json.loads(tokenizers.Tokenizer.from_str(content).to_str())
    assert written["model"]["merges"] == json.loads(content)["model"]["merges"]
    assert written["added_tokens"][0]["content"] == EOT and written["post_processor"] is None


@pytest.mark.slow
@pytest.mark.network
def test_the_real_one(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """SmolLM2's 49,152 tokens, of which none is for eight bytes of UTF-8; and 2,000 of them."""
    asked = load_models(ROOT)["smollm2_135m"]
    asked = asked.model_copy(update={"sources": asked.sources[:1]})
    folder = tmp_path / "raw" / "smollm2_135m"
    try:
        fetch(asked, folder, cache=tmp_path_factory.getbasetemp())
    except UserError as error:
        pytest.skip(str(error))
    real = fetched_tokenizer("hf:smollm2_135m", folder)
    assert real.is_fast and (real.vocab_size, real.eot) == (49_152, 0)
    of = reference(folder / "tokenizer.json")
    lost = {byte for byte in UTF8 if bytes([byte]) not in real.vocabulary.contents[17:]}
    assert lost == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    for text in TEXTS + random_texts(1000) + stories(20):
        ids = real.encode(text)
        assert real.decode(ids) == text
        if not set(text.encode()) & lost:
            assert ids == of(text), ascii(text)
    reduced = reduced_tokenizer("hf:smollm2_135m:2000", real, stories(200))
    reduced.save(tmp_path / "stored")
    of = reference(tmp_path / "stored" / "tokenizer.json")
    for text in TEXTS + random_texts(1000) + stories(20):
        assert reduced.encode(text) == of(text) and reduced.decode(reduced.encode(text)) == text


def test_a_model_with_more_rows_than_tokens_is_refused_as_a_whole(tiny, folder, monkeypatch):
    monkeypatch.setattr(vocabulary, "vocabulary_size", lambda name: {"hf:tiny": 512}[name])
    with pytest.raises(UserError, match=r"hf:tiny: .* 512 rows .* 500 tokens; .*hf:tiny:N takes the rows"):
        vocabulary.published_tokenizer("hf:tiny", folder)
    assert vocabulary.published_tokenizer("hf:tiny:300", folder).files == tiny.files
    monkeypatch.setattr(vocabulary, "vocabulary_size", lambda name: 500)
    assert vocabulary.published_tokenizer("hf:tiny", folder).files == tiny.files
