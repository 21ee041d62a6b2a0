"""`stlm report`: makes a study's tables, plots, pages and metrics from its runs' files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from stlm.files import atomic_directory, remove_leftovers, write_json, write_record, write_text
from stlm.outputs import METRICS, REPORT, names
from stlm.provenance import code_version
from stlm.report.accuracies import accuracy_tables
from stlm.report.architecture import write_architectures, write_parameters
from stlm.report.bits_table import bits_table, component_table
from stlm.report.card import write_cards
from stlm.report.comparison import compare_all
from stlm.report.compression import compression_table
from stlm.report.contamination import contamination_note, contamination_table, leaks_table, read_contamination
from stlm.report.curves import read_variants
from stlm.report.documents import amount_note
from stlm.report.efficiency import efficiency_table, write_efficiency
from stlm.report.equal_cost import equal_cost_table, equal_costs, write_equal_cost
from stlm.report.headline import findings, front_page, headline_table
from stlm.report.hyperparameters import table1, variants_table
from stlm.report.pareto import write_pareto
from stlm.report.phenomena import phenomena_table
from stlm.report.plots import write_plots
from stlm.report.readouts import readouts_table, write_readouts
from stlm.report.records import write_records
from stlm.report.results import Results, read_results
from stlm.report.sources import read_texts
from stlm.report.statistics import group_records, statistics_records
from stlm.report.table import Table, csv_text, write_checksums, write_table
from stlm.report.training import write_training_pages
from stlm.report.unlike import rows_of, unlike_note
from stlm.study.runs import Study
from stlm.text_table import text_table


def report(study: Study) -> None:
    """Write the outputs of `stlm.outputs.REPORT` and metrics.json to results/<study>/, from earlier stages.

    All input is read and compared before anything is written. Each output replaces its predecessor as a
    whole, and only once all of them are made. Raises UserError naming a run's missing or damaged file and
    the command that makes it.
    """
    code = code_version()
    results = read_results(study)
    comparisons, contamination = compare_all(results), read_contamination(study)
    unlike = unlike_note(rows_of(results, published=True))
    unlike_trained = unlike_note(rows_of(results), scored=False)
    for corpus, tokenizer in {(run.train.corpus, run.train.tokenizer) for run in results.values()}:
        read_texts(corpus, tokenizer)  # the model cards read them, too: damage is reported before writing
    variants = read_variants(results)
    costs = equal_costs(variants) if variants else None
    trainings = [
        table1(results),
        variants_table(results),
        equal_cost_table(study, costs) if costs else None,
        efficiency_table(study, variants) if variants else None,
    ]
    bits = bits_table(results)
    headline = headline_table(study, findings(results, bits.records))
    tables = [
        *_noted([headline], unlike),
        *_noted(trainings, unlike_trained),
        *_noted(accuracy_tables(results, comparisons), contamination_note(contamination), unlike),
        *_noted([phenomena_table(results)], unlike),
        *_noted([contamination_table(study, contamination), leaks_table(study, contamination)]),
        *_noted(
            [bits, component_table(results), readouts_table(results), compression_table(results)], unlike
        ),
    ]
    for name in names((*REPORT, METRICS)):
        remove_leftovers(study.folder, name)  # of a report that was killed
    collected = metrics(results)
    text = summary(results, collected, unlike)
    with ExitStack() as stack:
        # Each replaces its predecessor when the block ends: if one cannot be made, all stay as they were.
        folders = {name: stack.enter_context(atomic_directory(study.folder / name)) for name in names(REPORT)}
        tables_folder, plots = folders["tables"], folders["plots"]
        for table in tables:
            write_table(tables_folder, folders["typeset"], table)
        write_text(folders["typeset"] / "headline.rst", front_page(headline))
        write_text(tables_folder / "groups.csv", csv_text(group_records(results)))
        write_text(tables_folder / "statistics.csv", csv_text(statistics_records(results, comparisons)))
        write_record(tables_folder / "made.json", {"study": study.name, "code": code})
        write_checksums(tables_folder)
        write_records(folders["records"], {run: study.runs[run].folder for run in results})
        write_plots(plots, results, comparisons)
        if costs:
            write_efficiency(plots, study, variants)
            write_equal_cost(plots, study, costs)
        for write in (write_architectures, write_parameters, write_pareto, write_readouts):
            write(plots, results)
        write_training_pages(folders["training"], results)
        write_cards(folders["cards"], results, comparisons, contamination)
    write_json(study.folder / "metrics.json", collected)
    print(text)


def _noted(tables: Iterable[Table | None], *notes: str | None) -> list[Table]:
    """The tables that there are, with further notes below them."""
    return [replace(table, notes=[*table.notes, *notes]) for table in filter(None, tables)]


def summary(results: Results, collected: Mapping[str, Mapping[str, float]], unlike: str | None = None) -> str:
    """The study's metrics for the terminal, a line for each run; `unlike`: a note on how they were made."""
    names = list(dict.fromkeys(name for numbers in collected.values() for name in numbers))[2:]
    rows = [["", *(name.removeprefix("test_").replace("_", " ") for name in names)]]
    for run, numbers in collected.items():
        shown = ["–" if name not in numbers else _shown(name, numbers[name]) for name in names]
        rows.append([results[run].label, *shown])
    lines = [*text_table(rows), amount_note(results.texts), *filter(None, [unlike])]
    return "\n".join([*lines, f"Accuracies in percent; tables and plots: {results.study.folder}/"])


def _shown(name: str, value: float) -> str:
    fraction = not name.startswith("test_") and not name.endswith("_perplexity")
    return f"{100 * value:.1f}" if fraction else f"{value:.3f}"


def metrics(results: Results) -> dict[str, dict[str, float]]:
    """Run -> name -> number, flat, for `dvc metrics`; accuracies are fractions."""
    collected = {}
    for name, run in results.items():
        numbers: dict[str, float | None] = {
            "parameters": run.train.parameters.total,
            "tokens": run.last.tokens,
            "test_bits_per_byte": run.perplexity.bits_per_byte,
            "test_char_perplexity": run.perplexity.char_perplexity,
        }
        for component, text in run.perplexity.components.items():
            numbers[f"test_bits_per_byte_{component}"] = text.bits_per_byte
        for benchmark in run.last.benchmarks:
            accuracy = run.last.accuracy(benchmark, results.mode)
            numbers[benchmark] = accuracy and accuracy.value
            numbers[f"{benchmark}_perplexity"] = run.word_perplexity(benchmark, results.mode)
        collected[name] = {key: round(value, 4) for key, value in numbers.items() if value is not None}
    return collected
