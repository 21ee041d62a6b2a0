"""The command ``stlm``: one verb for each stage, and no logic.

Large packages are imported by the verb that needs them, so that ``stlm --help`` is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import stlm
from stlm.cpu_runtime import tune_process
from stlm.errors import Interrupted, UserError
from stlm.files import of_the_machine
from stlm.options import (
    add_drafts_options,
    add_export_options,
    add_generate_options,
    add_import_options,
    add_importance_options,
    add_new_options,
    whole_number,
)
from stlm.terminal import flush_output, tell, tune_streams

RAW = Path("data/raw")
TOKENS = Path("data/tokens")


def _study(options: argparse.Namespace):
    from stlm.engines import check_active
    from stlm.study.load import load_study

    study = load_study(options.study, options.set)
    check_active(study)
    return study


def fetch(options: argparse.Namespace) -> None:
    """Fetch a corpus, mix, benchmark, vocabulary or published model into data/raw/NAME/."""
    from stlm.corpora.fetch import fetch as fetch_entry
    from stlm.errors import nearest, shortened
    from stlm.study.catalogues import load_benchmarks, load_corpora, load_models, load_vocabularies

    corpora = load_corpora()
    entries = {**corpora, **load_benchmarks(), **load_vocabularies(), **load_models()}
    if options.name not in entries:
        raise UserError(
            f"{shortened(options.name)!r} is in none of params/corpora.yaml, benchmarks.yaml, "
            f"vocabularies.yaml and models.yaml{nearest(options.name, entries)}"
        )
    mirror = options.mirror or os.environ.get("STLM_MIRROR")
    mirror = Path(mirror).expanduser() if mirror else None
    if mirror is not None and not mirror.is_dir():
        flag = "--mirror" if options.mirror else "STLM_MIRROR"
        raise UserError(f"{flag}: {mirror} is no folder; expected one laid out as data/README.md says")
    from stlm.engines import active_study
    from stlm.recording import after_fetch

    active_study()  # refuses a damaged dvc.yaml, which is read again once the data are there
    fetch_entry(entries[options.name], RAW / options.name, mirror, corpora=corpora)
    after_fetch(options.name, mirror)


def tokenize(options: argparse.Namespace) -> None:
    """Tokenize data/raw/CORPUS/ into data/tokens/CORPUS/TOKENIZER/."""
    from stlm.errors import nearest, shortened
    from stlm.study.catalogues import load_corpora
    from stlm.tokens.names import hf_name, vocabulary_size

    corpora = load_corpora()
    if options.corpus not in corpora:
        raise UserError(f"unknown corpus {shortened(options.corpus)!r}{nearest(options.corpus, corpora)}")
    vocabulary_size(options.tokenizer)  # refuses an unknown name before the heavy imports
    from stlm.tokens.tokenize import tokenize_corpus

    published = hf_name(options.tokenizer)
    tokenize_corpus(
        RAW / options.corpus,
        TOKENS / options.corpus / options.tokenizer,
        options.tokenizer,
        RAW / (published.model if published else options.tokenizer),
        memory_bytes=options.memory << 20,
    )


def teach(options: argparse.Namespace) -> None:
    """Ask the teacher of a run about the text that the run will train on, once, and keep its answers."""
    study = _study(options)
    run = study.run(options.run)
    from stlm.preflight import check_teaching
    from stlm.teaching.teach import teach as teach_run

    check_teaching(run)
    teach_run(run)


def train(options: argparse.Namespace) -> None:
    """Train one run of a study; after a kill, the same command continues from the last state."""
    study = _study(options)
    run = study.run(options.run)
    from stlm.preflight import check_training
    from stlm.training.loop import train as train_run

    train_run(run, lambda: check_training(study, run))


def evaluate(options: argparse.Namespace) -> None:
    """Score every checkpoint of a run, or a published model: test perplexity and the study's benchmarks."""
    study = _study(options)
    from stlm.preflight import check_evaluation

    if options.run in study.published:
        published = study.published[options.run]
        check_evaluation(f"model {published.name}", published.results_folder, published.state_folder)
        from stlm.evaluation.published import evaluate_published

        evaluate_published(published, study.evaluation)
        return
    if study.published and options.run not in study.runs:
        from stlm.errors import nearest, shortened

        known = [*study.runs, *study.published]
        raise UserError(
            f"study {study.name!r} has no run or model {shortened(options.run)!r}"
            f"{nearest(options.run, known)}"
        )
    run = study.run(options.run)
    from stlm.evaluation.evaluate import evaluate_run

    check_evaluation(f"run {run.name}", run.folder, run.state_folder)
    evaluate_run(run, study.evaluation)


def contamination(options: argparse.Namespace) -> None:
    """Count the benchmark items of a study that occur, in part or whole, in its training text."""
    study = _study(options)
    from stlm.evaluation.contamination import measure_contamination

    measure_contamination(study)


def report(options: argparse.Namespace) -> None:
    """Write the tables, plots and metrics of a study from its runs."""
    study = _study(options)
    from stlm.report.build import report as build_report

    build_report(study)


def compare(options: argparse.Namespace) -> None:
    """Compare two models item by item: accuracies, paired differences and tests."""
    from stlm.report.pairwise import print_comparison

    print_comparison(options.a, options.b, options.force, options.json)


def generate(options: argparse.Namespace) -> None:
    """Continue a prompt with a trained or published model, printing the text as it is sampled."""
    prompt = options.prompt
    if options.prefix is not None or options.suffix is not None:
        _generate_infilled(options)
        return
    if prompt is not None and options.prompts is not None:
        raise UserError("--prompts: expected without a PROMPT")
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8: {error}") from None
    prompt = prompt and _as_text(prompt)
    from stlm.generation.generate import Draft
    from stlm.generation.generate import generate as generate_text
    from stlm.generation.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    # Texts of any alphabet, whatever the locale.
    sys.stdout.reconfigure(encoding="utf-8", errors=sys.stdout.errors)
    draft = Draft(options.draft, options.draft_length, options.fallback, options.rollback)
    how = (
        options.tokens,
        options.seed,
        options.samples,
        not options.no_cache,
        options.device,
        draft,
        options.readout,
    )
    if options.prompts is not None:
        from stlm.generation.prompts import generate_all

        generate_all(options.run, Path(options.prompts), sampling, *how, options.batch)
        return
    generate_text(options.run, prompt, sampling, *how)


def _as_text(argument: str) -> str:
    """An argument of the command line: bytes that the locale has no characters for may be UTF-8 all the same.

    Of what is not UTF-8 the model's tokenizer tells the place.
    """
    with suppress(UnicodeError):
        return argument.encode(errors="surrogateescape").decode()
    return argument


def _generate_infilled(options: argparse.Namespace) -> None:
    """`stlm generate --prefix TEXT --suffix TEXT`."""
    for name in ("prompt", "prompts", "readout", "draft", "draft_length", "fallback", "rollback"):
        if getattr(options, name) is not None:
            shown = "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown}: expected without --prefix and --suffix")
    from stlm.generation.infill import infill
    from stlm.generation.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    sys.stdout.reconfigure(encoding="utf-8", errors=sys.stdout.errors)
    texts = (_as_text(text or "") for text in (options.prefix, options.suffix))
    cached = not options.no_cache
    infill(
        options.run, *texts, sampling, options.tokens, options.seed, options.samples, cached, options.device
    )


def drafts(options: argparse.Namespace) -> None:
    """Measure which drafts make a model write faster; `stlm generate --draft auto` takes the fastest."""
    from stlm.generation.drafts import drafts as measure_drafts
    from stlm.generation.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    print(
        measure_drafts(
            options.run,
            options.drafts,
            options.lengths,
            options.prompt,
            options.tokens,
            options.rounds,
            sampling,
            options.device,
        )
    )


def export(options: argparse.Namespace) -> None:
    """Write a trained model with its tokenizer and model card for transformers or llama.cpp."""
    from stlm.export.export import export as export_run
    from stlm.export.export import export_file

    target = Path(options.target)
    if target.suffix.lower() == ".gguf":
        kind = options.type or "F32"
        export_file(options.run, target, kind, options.fallback, options.force)
        return
    for flag in ("type", "fallback"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag}: is for a GGUF file, whose name ends in .gguf; found {target}")
    export_run(options.run, target, options.force)


def import_(options: argparse.Namespace) -> None:
    """Make a GGUF file a published model of this project, with an entry in params/models.yaml."""
    from stlm.export.gguf_import import Known, import_gguf

    known = Known(options.licence, options.origin, options.prefix, options.training_tokens)
    print(import_gguf(Path(options.file), options.name, known, options.force))


def importance(options: argparse.Namespace) -> None:
    """Measure what matters in the model that a run starts from, and what cutting it costs; trains nothing."""
    run = _study(options).run(options.run)
    from stlm.training.importance_tables import importance_tables

    print(importance_tables(run, options.layers, options.loss))


def study(options: argparse.Namespace) -> None:
    """List the runs of a study with their size and cost, and its published models; trains nothing."""
    from stlm.engines import active_study
    from stlm.study.listing import runs_table
    from stlm.study.load import load_study

    name = options.study if options.study is not None else active_study() or "smoke"
    print(runs_table(load_study(name, options.set)))


def sizes(options: argparse.Namespace) -> None:
    """Propose models of given sizes by the family's rule: parameters, cost, memory, and ways of sharing."""
    from stlm.model.family import FAMILY
    from stlm.study.sizes import family, parse_sizes, text_table
    from stlm.tokens.names import vocabulary_size

    wanted = parse_sizes(options.parameters) if options.parameters else FAMILY
    print(text_table(family(wanted, vocabulary_size(options.tokenizer), options.context)))


def new(options: argparse.Namespace) -> None:
    """Examine your own text, and write a corpus and a study that fit it and this machine."""
    from stlm.new.new import Wishes
    from stlm.new.new import new as new_study

    wishes = Wishes(options.column, options.documents, options.separator, options.minutes, options.force)
    print(new_study(options.name, options.text, wishes))


def use(options: argparse.Namespace) -> None:
    """Make a study the active one: write its stages to dvc.yaml."""
    from stlm.engines import use as use_study

    changed = use_study(options.study)
    print(f"dvc.yaml {'now lists' if changed else 'already lists'} the stages of the study {options.study}")


def fingerprint(options: argparse.Namespace) -> None:
    """Record the fingerprint of the local files that data, or a published model, are read from."""
    from stlm.manifests import write_manifest

    changed = write_manifest(options.name, options.model)
    what = options.name if options.model is None else f"{options.name} {options.model}"
    print(f"{what}: the files {'have changed' if changed else 'are as they were'}")


def sync(options: argparse.Namespace) -> None:
    """Update Snakemake's records after `dvc repro` or `dvc pull`."""
    from stlm.recording import sync as sync_engines

    name = sync_engines()
    print(f"Snakemake's records agree with the results of the study {name}")


def document(options: argparse.Namespace) -> None:
    """Write the generated documentation: params/README.md, results in README.md, tables, plots in docs/."""
    from stlm.docs_pages.bytes import write_bytes_page
    from stlm.docs_pages.findings import write_findings
    from stlm.docs_pages.inheriting import write_inheriting_page
    from stlm.docs_pages.readmes import check_repository, write_params_readme, write_readme_results
    from stlm.docs_pages.schedules import write_schedule_plots
    from stlm.study.sizes import write_sizes_page

    check_repository()
    print(f"wrote {write_params_readme()}")
    print(f"wrote {write_readme_results()}")
    print(f"wrote {write_findings()}")
    print(f"wrote {write_schedule_plots()}")
    print(f"wrote {write_sizes_page()}")
    print(f"wrote {write_bytes_page()}")
    print(f"wrote {write_inheriting_page()}")


class _Parser(argparse.ArgumentParser):
    """A parser whose help is an error like any other output if it cannot be written."""

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        (file or sys.stderr).write(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(
        prog="stlm",
        description="Research on super tiny language models: the stages of the pipeline, a verb each.",
    )
    top.add_argument("--version", action="version", version=f"stlm {stlm.__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(function, *arguments: tuple[str, str], overridable: bool = False) -> argparse.ArgumentParser:
        # `import` is a word of Python, so its function has another name.
        subparser = verbs.add_parser(
            function.__name__.rstrip("_"), help=function.__doc__, description=function.__doc__
        )
        subparser.set_defaults(function=function)
        for name, text in arguments:
            subparser.add_argument(name, metavar=name.upper(), help=text)
        if overridable:
            subparser.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="KEY=VALUE",
                help="override a parameter of the study, for example model.layers=2 (repeatable)",
            )
        return subparser

    of_study = ("study", "a study: the name of a file in params/, for example smoke")
    of_run = ("run", "a run of the study, as `stlm study` lists them")
    listing = verb(study, overridable=True)
    listing.add_argument(
        "study", metavar="STUDY", nargs="?", help="default: the active study, as cloned smoke"
    )
    fetcher = verb(fetch, ("name", "a corpus, mix, benchmark, vocabulary or model in params/"))
    fetcher.add_argument(
        "--mirror", metavar="FOLDER", help="a local folder laid out like the hub (default: STLM_MIRROR)"
    )
    tokenizing = verb(
        tokenize,
        ("corpus", "a corpus or mix in params/corpora.yaml"),
        (
            "tokenizer",
            "gpt2, bytes, bpe-N: a byte-pair vocabulary of N tokens trained on the corpus; hf:NAME: that of "
            "a model in params/models.yaml, hf:NAME:N: the N of its tokens that the corpus needs; or for "
            "byte-level models words, spaces, stride-N",
        ),
    )
    tokenizing.add_argument(
        "--memory",
        type=whole_number(16, 1 << 24),
        default=256,
        metavar="MB",
        help="memory of the search for near-duplicate documents; changes no result of up to some million "
        "documents (default: 256)",
    )
    verb(teach, of_study, of_run, overridable=True)
    verb(train, of_study, of_run, overridable=True)
    add_importance_options(verb(importance, of_study, of_run, overridable=True))
    of_model = ("run", "a run of the study, or a model under its key `published`")
    verb(evaluate, of_study, of_model, overridable=True)
    verb(contamination, of_study, overridable=True)
    verb(report, of_study, overridable=True)
    of_predictions = "STUDY/RUN, a run's folder or an items.parquet; @STEP after it: that checkpoint"
    comparer = verb(compare, ("a", of_predictions), ("b", "the same; differences are B - A"))
    comparer.add_argument(
        "--force", action="store_true", help="compare also what was scored by other rules or files"
    )
    comparer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sizer = verb(sizes)
    sizer.add_argument(
        "parameters", metavar="PARAMETERS", nargs="*", help="for example 20M; default: 10M 50M 100M"
    )
    sizer.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, bpe-N, hf:NAME or hf:NAME:N")
    sizer.add_argument(
        "--context", type=whole_number(2, 10**9), default=512, help="longest sequence, in tokens"
    )
    of_checkpoint = "STUDY/RUN, a run's folder or a checkpoint's; @STEP after it: that checkpoint"
    generator = verb(
        generate,
        ("run", f"{of_checkpoint}; or a published model's STUDY/NAME or folder"),
    )
    prompt = generator.add_argument(
        "prompt", metavar="PROMPT", help="the beginning of a document, may be empty; - reads it from stdin"
    )
    add_generate_options(generator, prompt)
    drafter = verb(drafts, ("run", of_checkpoint))
    drafter.add_argument(
        "drafts",
        metavar="DRAFT",
        nargs="*",
        help="as for `stlm generate --draft`; default: all of the run's own",
    )
    add_drafts_options(drafter)
    of_target = "where to: a folder for transformers, or a file NAME.gguf for llama.cpp"
    add_export_options(verb(export, ("run", of_checkpoint), ("target", of_target)))
    of_model_name = "of the model in params/models.yaml and data/raw/"
    add_import_options(verb(import_, ("file", "a GGUF file with a Llama"), ("name", of_model_name)))
    add_new_options(verb(new, ("name", "of the corpus and study: lower-case letters, digits, _, -")))
    verb(use, of_study)
    fingerprinter = verb(fingerprint, ("name", "data in params/, or a study"))
    fingerprinter.add_argument(
        "model", metavar="MODEL", nargs="?", help="of a study: a model under its key `published`"
    )
    verb(sync)
    verb(document)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, 2 for an error that the user can mend, 128 + a signal's number.

    Other exceptions are mistakes of the program, and leave it with their traceback; so do all where the
    variable STLM_TRACEBACK is set.
    """
    tune_streams()
    return flush_output(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = parser().parse_args(arguments)
        tune_process()
        options.function(options)
    except SystemExit as stop:  # argparse's, after --help or for its own errors
        return stop.code if isinstance(stop.code, int) else 2
    except UserError as error:
        if os.environ.get("STLM_TRACEBACK"):
            raise
        tell(f"error: {error}")
        return 2
    except Interrupted as stop:
        tell(str(stop))
        return stop.status
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from what is saved")
        return 130
    except BrokenPipeError:
        return 141  # the reader of a listing, such as `head`, had enough
    except Exception as error:
        message = of_the_machine(error)
        if message is None or os.environ.get("STLM_TRACEBACK"):
            raise
        tell(f"error: {message}")
        return 2
    return 0
