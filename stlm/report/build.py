"""`stlm report`: makes a study's tables, plots, pages and metrics from its runs' files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from stlm.files import atomic_directory, remove_leftovers, write_json, write_record, write_text
from stlm.outputs import METRICS, REPORT, names
from stlm.provenance import code_version
from stlm.report.accuracies import accuracy_tables, main_mode, score
from stlm.report.architecture import write_architectures, write_parameters
from stlm.report.bits_table import bits_table, component_table
from stlm.report.card import write_cards
from stlm.report.comparison import compare_all, published_alike
from stlm.report.contamination import contamination_note, contamination_table, leaks_table, read_contamination
from stlm.report.curves import read_variants
from stlm.report.documents import amount_note
from stlm.report.efficiency import efficiencies, efficiency_table, write_efficiency
from stlm.report.equal_cost import equal_costs
from stlm.report.equal_cost_views import equal_cost_table, write_equal_cost
from stlm.report.headline import findings, front_page, headline_table
from stlm.report.hyperparameters import table1, variants_table
from stlm.report.pareto import write_pareto
from stlm.report.phenomena import phenomena_tables
from stlm.report.plots import write_plots
from stlm.report.readouts import readouts_table, write_readouts
from stlm.report.records import write_records
from stlm.report.results import RunResult, read_published, read_results, run_label
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
    results, published = read_results(study), read_published(study)
    comparisons = compare_all(results, study.baseline)
    comparisons.disturbing.extend(published_alike(results[study.baseline], published))
    contamination = read_contamination(study)
    rows = rows_of(results, published)
    made, trained = unlike_note(rows), unlike_note(rows_of(results), scored=False)
    for corpus, tokenizer in {(result.train.corpus, result.train.tokenizer) for result in results.values()}:
        read_texts(corpus, tokenizer)  # the model cards read them, too: damage is reported before writing
    variants = read_variants(study, results)
    compared = efficiencies(variants) if variants else []
    costs = equal_costs(variants) if variants else None
    trainings = [
        table1(study, results),
        variants_table(study, results),
        equal_cost_table(study, costs) if costs else None,
        efficiency_table(study, compared) if compared else None,
    ]
    bits = bits_table(study, results, published)
    headline = headline_table(study, findings(results, bits.records))
    note = contamination_note(contamination)
    tables = [
        *_noted([headline], made),
        *_noted(trainings, trained),
        *_noted(accuracy_tables(study, results, comparisons, published), note, made),
        *_noted(phenomena_tables(study, results), made),
        *_noted([contamination_table(study, contamination), leaks_table(study, contamination)]),
        *_noted([bits, component_table(study, results), readouts_table(study, results)], made),
    ]
    for name in names((*REPORT, METRICS)):
        remove_leftovers(study.folder, name)  # of a report that was killed
    collected = metrics(results)
    text = summary(study, results, collected, made)
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
        write_plots(plots, study, results, comparisons)
        if compared:
            write_efficiency(plots, study, compared)
        if costs:
            write_equal_cost(plots, study, costs)
        write_architectures(plots, study, results)
        write_parameters(plots, study, results)
        write_pareto(plots, study, results)
        write_readouts(plots, study, results)
        write_training_pages(folders["training"], study, results)
        write_cards(folders["cards"], study, results, comparisons, contamination)
    write_json(study.folder / "metrics.json", collected)
    print(text)


def _noted(tables: Iterable[Table | None], *notes: str | None) -> list[Table]:
    """The tables that there are, with further notes below them."""
    return [replace(table, notes=[*table.notes, *filter(None, notes)]) for table in filter(None, tables)]


def summary(
    study: Study,
    results: Mapping[str, RunResult],
    collected: Mapping[str, Mapping[str, float]],
    made: str | None = None,
) -> str:
    """The study's metrics for the terminal, a line for each run. `made`: what rows were made differently."""
    names = list(dict.fromkeys(name for numbers in collected.values() for name in numbers))[2:]
    header = ["", *(name.removeprefix("test_").replace("_", " ") for name in names)]
    rows = [
        [
            run_label(results[run], results),
            *("–" if name not in numbers else _shown(name, numbers[name]) for name in names),
        ]
        for run, numbers in collected.items()
    ]
    lines = text_table([header, *rows])
    texts = ((run_label(result, results), result.last.perplexity) for result in results.values())
    lines.append(amount_note(texts))
    lines += filter(None, [made])
    return "\n".join([*lines, f"Accuracies in percent; tables and plots: {study.folder}/"])


def _shown(name: str, value: float) -> str:
    fraction = not name.startswith("test_") and not name.endswith("_perplexity")
    return f"{100 * value:.1f}" if fraction else f"{value:.3f}"


def metrics(results: Mapping[str, RunResult]) -> dict[str, dict[str, float]]:
    """Run -> name -> number, flat, for `dvc metrics`; accuracies are fractions."""
    mode = main_mode(results)
    collected = {}
    for name, result in results.items():
        numbers: dict[str, float] = {
            "parameters": result.train.parameters.total,
            "tokens": result.last.tokens,
            "test_bits_per_byte": round(result.last.perplexity.bits_per_byte, 4),
            "test_char_perplexity": round(result.last.perplexity.char_perplexity, 4),
        }
        for component, text in result.last.perplexity.components.items():
            numbers[f"test_bits_per_byte_{component}"] = round(text.bits_per_byte, 4)
        for benchmark, scored in result.last.benchmarks.items():
            accuracy = score(scored, mode, "acc")
            if accuracy is not None:
                numbers[benchmark] = round(accuracy.value, 4)
            perplexity = result.word_perplexity(benchmark, mode)
            if perplexity is not None:
                numbers[f"{benchmark}_perplexity"] = round(perplexity, 4)
        collected[name] = numbers
    return collected
