"""Items read from parquet in the hub's columns, with the prompts of lm_eval 0.4.13's tasks."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stlm.errors import UserError
from stlm.evaluation.benchmarks import BENCHMARKS, FileBenchmark, benchmark, data_names, subset
from stlm.evaluation.interface import Request

ROWS = {
    "blimp": (
        "train.parquet",
        {
            "sentence_good": "Who should Derek hug after shocking Richard?",
            "sentence_bad": "Who should Derek hug Richard after shocking?",
            "UID": "adjunct_island",
            "linguistics_term": "island_effects",
            "pair_id": 0,
        },
    ),
    "hellaswag": (
        "validation-00000-of-00001.parquet",
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof. [header] He  rests.",
            "ctx_b": "he STARTS",
            "endings": ["is using wrap [substeps] now.", "pulls [title] tiles.", " holds it.", "ends."],
            "label": "3",
        },
    ),
    "arc_easy": (
        "test.parquet",
        {
            "id": "Mercury_1",
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ),
    "winogrande": (
        "validation.parquet",
        {
            "sentence": "Sarah was better than Maria so _ always got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
    ),
    "mmlu": (
        "test.parquet",
        {
            "question": " Find the degree. \n",
            "subject": "abstract_algebra",
            "choices": ["0", "4", "2", "6"],
            "answer": 1,
        },
    ),
    "synthetic_choice": (
        "validation.parquet",
        {"ctx": "Tom had a hat. ", "endings": ["He lost it.", "It ran."], "label": 0, "kind": "object"},
    ),
    "steps_arithmetic": (
        "test.parquet",
        {"question": "3 + 5 - 9 = ?", "options": ["8", "9"], "label": 1, "steps": 2},
    ),
}
ROWS["synthetic_pairs"] = ROWS["blimp"]
for _name in ("steps_arithmetic_written", "steps_entities", "steps_entities_written"):
    ROWS[_name] = ROWS["steps_arithmetic"]
ROWS["arc_challenge"] = ROWS["arc_easy"]
ROWS["mmlu_cloze"] = ROWS["mmlu"]
OF_FILES = sorted(name for name, one in BENCHMARKS.items() if isinstance(one, FileBenchmark))


def write(folder: Path, name: str, rows: list[dict], file: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (file or ROWS[name][0])
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def the_item(folder: Path, name: str, **changes):
    write(folder, name, [ROWS[name][1] | changes])
    split, (item,) = benchmark(name).load(folder)
    return split, item


def test_blimp_has_no_context_and_the_delimiting_space(tmp_path):
    split, item = the_item(tmp_path, "blimp")
    assert split == "train"
    assert item.id == "adjunct_island-0"
    assert item.groups == ("island_effects", "adjunct_island")
    assert item.gold == 0
    assert [o.request("harness") for o in item.options] == [
        Request("", " Who should Derek hug after shocking Richard?"),
        Request("", " Who should Derek hug Richard after shocking?"),
    ]


def test_s_selection_is_argument_structure_as_in_the_paper_of_blimp(tmp_path):
    _, item = the_item(tmp_path, "blimp", linguistics_term="s-selection", UID="animate_subject_trans")
    assert item.groups == ("argument_structure", "animate_subject_trans")


def test_hellaswag_is_cleaned_as_in_lm_eval(tmp_path):
    _, item = the_item(tmp_path, "hellaswag")
    context = "Roof shingle removal: A man is sitting on a roof. He rests. He starts"
    assert [o.request("harness") for o in item.options] == [
        Request(context, " is using wrap now."),
        Request(context, " pulls. tiles."),
        Request(context, " holds it."),
        Request(context, " ends."),
    ]
    assert item.options[0].words == "is using wrap now."  # the length that acc_norm divides by
    assert item.gold == 3
    assert item.options[3].request("paper") == Request(context, " ends.", whole=True)


def test_arc_takes_answers_labelled_with_letters_and_digits(tmp_path):
    _, item = the_item(tmp_path, "arc_easy")
    assert item.id == "Mercury_1"
    assert item.gold == 1
    assert item.options[1].request("harness") == Request("Question: Which is hot?\nAnswer:", " fire")
    letters = {"text": ["ice", "fire"], "label": ["A", "B"]}
    assert the_item(tmp_path, "arc_challenge", choices=letters, answerKey="A")[1].gold == 0


def test_winogrande_scores_the_rest_of_the_sentence(tmp_path):
    _, item = the_item(tmp_path, "winogrande")
    assert [o.request("harness") for o in item.options] == [
        Request("Sarah was better than Maria so Sarah", " always got the easier cases."),
        Request("Sarah was better than Maria so Maria", " always got the easier cases."),
    ]
    assert item.gold == 1


def test_mmlu_names_the_subject_and_scores_letters(tmp_path):
    split, item = the_item(tmp_path, "mmlu")
    assert split == "test"
    assert item.groups == ("abstract_algebra",)
    assert item.options[1].request("harness") == Request(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:",
        " B",
    )
    assert item.gold == 1


def test_mmlu_and_its_cloze_form_read_one_folder(tmp_path):
    assert data_names(["mmlu_cloze", "blimp", "last_word", "mmlu"]) == ["mmlu", "blimp"]
    with pytest.raises(UserError, match=r"no parquet file .* of mmlu_cloze .* run: stlm fetch mmlu$"):
        benchmark("mmlu_cloze").load(tmp_path)


def test_mmlu_cloze_asks_what_lm_eval_asks(tmp_path):
    """Hand-written rows through lm_eval's own task files, its description, template and choices."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm_eval")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    files = Path(tasks.__file__).parent / "mmlu" / "continuation"
    rows = [
        {"question": " Find  the degree. \n", "choices": ["0", "4", "2 ", " 6"], "answer": 1},
        {
            "question": "Who's “it”?\nOr {{this}}?",
            "choices": ["it's", 'a "b"', "c\\d\n", "{{e}}"],
            "answer": 3,
        },
        {"question": "_ is\tblank", "choices": ["é – ü", "None", "True", "['x']"], "answer": 0},
    ]
    asked = []
    for subject in ("abstract_algebra", "high_school_european_history", "us_foreign_policy"):
        own = [row | {"subject": subject} for row in rows]
        asked += own
        config = load_yaml(files / f"mmlu_{subject}.yaml")
        assert config["metadata"]["version"] == float(benchmark("mmlu_cloze").version)
        splits = {"test": Dataset.from_list(own), "dev": Dataset.from_list(own)}
        task = ConfigurableTask(config=config | {"custom_dataset": lambda splits=splits, **_: splits})
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        assert set(task.aggregation()) == {"acc", "acc_norm"}

        write(tmp_path, "mmlu", own)
        _, items = benchmark("mmlu_cloze").load(tmp_path)
        ours = [option.request("harness") for item in items for option in item.options]
        assert [(r.context, r.continuation) for r in ours] == [r.args for r in task.instances]
        for doc, item in zip(splits["test"], items, strict=True):
            # Whichever option is made the likeliest per character, with a length of its own.
            assert [len(option.words) for option in item.options] == [len(c) for c in task.doc_to_choice(doc)]
            assert task.doc_to_target(doc) == item.gold
            assert item.groups == (subject,)


def test_synthetic_choice_reads_a_story_with_endings(tmp_path):
    _, item = the_item(tmp_path, "synthetic_choice")
    assert item.options[0].request("harness") == Request("Tom had a hat.", " He lost it.")
    assert item.groups == ("object",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blimp", "Who should Derek hug after shocking Richard?"),
        ("hellaswag", "A man is sitting on a roof. He rests. He starts ends."),
        ("arc_easy", "Which is hot? fire"),
        ("winogrande", "Sarah was better than Maria so Maria always got the easier cases."),
        ("mmlu", "Find the degree. 4"),
        ("synthetic_choice", "Tom had a hat. He lost it."),
        ("steps_arithmetic", "3 + 5 - 9 = ? 9"),
    ],
)
def test_an_items_own_text_has_the_right_answer_and_no_words_of_a_prompt(tmp_path, name, expected):
    _, item = the_item(tmp_path, name)
    assert " ".join(item.answered_text.split()) == expected


def test_the_split_is_chosen_by_the_files_names(tmp_path):
    write(tmp_path, "mmlu", [ROWS["mmlu"][1]] * 5, "dev.parquet")
    write(tmp_path, "mmlu", [ROWS["mmlu"][1]] * 2, "test-00000-of-00002.parquet")
    write(tmp_path, "mmlu", [ROWS["mmlu"][1]] * 2, "test-00001-of-00002.parquet")
    split, items = benchmark("mmlu").load(tmp_path)
    assert (split, len(items), len({item.id for item in items})) == ("test", 4, 4)


def test_arc_falls_back_to_the_validation_split_and_says_so(tmp_path):
    write(tmp_path, "arc_easy", [ROWS["arc_easy"][1]], "validation.parquet")
    assert benchmark("arc_easy").load(tmp_path)[0] == "validation"


@pytest.mark.parametrize("name", OF_FILES)
def test_missing_columns_are_named_with_their_file(tmp_path, name):
    row = dict(ROWS[name][1])
    column = benchmark(name).columns[-1]
    del row[column]
    path = write(tmp_path, name, [row])
    with pytest.raises(UserError, match=rf"{path}: {name} lacks the column\(s\) {column}"):
        benchmark(name).load(tmp_path)


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no parquet file of the split test .* stlm fetch mmlu"):
        benchmark("mmlu").load(tmp_path)
    path = write(tmp_path, "mmlu", [ROWS["mmlu"][1], ROWS["mmlu"][1] | {"answer": 4}])
    with pytest.raises(
        UserError, match=r"mmlu, row 1: the answer 4 is none of 0, 1, 2, 3; run: stlm fetch mmlu"
    ):
        benchmark("mmlu").load(tmp_path)
    write(tmp_path, "mmlu", [ROWS["mmlu"][1] | {"choices": None}])
    with pytest.raises(
        UserError, match="mmlu: column choices: found null, expected a list; run: stlm fetch mmlu"
    ):
        benchmark("mmlu").load(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{path}: not a readable parquet file"):
        benchmark("mmlu").load(tmp_path)
    pq.write_table(pa.Table.from_pylist([ROWS["mmlu"][1]]).slice(0, 0), path)
    with pytest.raises(UserError, match="has no rows"):
        benchmark("mmlu").load(tmp_path)
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        benchmark("helaswag")


def test_a_limit_draws_a_stable_random_subset():
    items = list(range(1000))
    drawn = subset(items, 100, 0, "blimp")
    assert drawn == subset(items, 100, 0, "blimp") == sorted(drawn)
    assert len(drawn) == 100
    assert drawn != items[:100]
    assert set(subset(items, 10, 0, "blimp")) < set(drawn)
    assert drawn != subset(items, 100, 1, "blimp")
    assert drawn != subset(items, 100, 0, "mmlu")
    assert subset(items, None, 0, "blimp") == subset(items, 1000, 0, "blimp") == items


FOLDERS = {
    "mmlu_cloze": ("mmlu/all", 14_042, 4),
    "blimp": ("blimp", 67_000, 2),
    "hellaswag": ("hellaswag", 10_042, 4),
    "arc_easy": ("ai2_arc/ARC-Easy", 2_376, None),
    "arc_challenge": ("ai2_arc/ARC-Challenge", 1_172, None),
    "winogrande": ("winogrande/winogrande_xl", 1_267, 2),
    "mmlu": ("mmlu/all", 14_042, 4),
}


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_the_published_files_are_read(mirror, name):
    folder, n_items, n_options = FOLDERS[name]
    _, items = benchmark(name).load(mirror / "benchmarks" / folder)
    assert len(items) == len({item.id for item in items}) == n_items
    assert {len(item.options) for item in items} == ({n_options} if n_options else {3, 4, 5})
    groups = [len({item.groups[k] for item in items}) for k in range(len(benchmark(name).group_kinds))]
    assert groups == {"blimp": [12, 67], "mmlu": [57], "mmlu_cloze": [57]}.get(name, [])
