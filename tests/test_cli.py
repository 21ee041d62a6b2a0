"""The command line as a user meets it: a process, its output, its exit status."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from stlm.cli import main


def stlm(*arguments, cwd, env=None):
    return subprocess.run(
        [sys.executable, "-m", "stlm", *arguments], cwd=cwd, capture_output=True, text=True, env=env
    )


def test_help_and_listing_import_nothing_heavy(project):
    heavy = {"torch", "datasets", "pandas", "matplotlib", "pyarrow", "dvc", "snakemake"}
    code = (
        "import sys; from stlm.cli import main\n"
        "try: main(sys.argv[2:])\n"
        "except SystemExit: pass\n"
        "heavy = set(sys.argv[1].split())\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    # A listing counts parameters and FLOPs on torch's modules, but needs nothing of torch's compiler.
    listing = heavy - {"torch"} | {"torch._dynamo"}
    for arguments, names in ((["--help"], heavy), (["study", "paper"], listing)):
        done = subprocess.run(
            [sys.executable, "-c", code, " ".join(names), *arguments],
            cwd=project,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_study_lists_runs(project):
    done = stlm("study", "desk", cwd=project)
    assert done.returncode == 0, done.stderr
    for text in ("SinCos PE", "gutenberg_children", "FLOPs", "baseline: baseline"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["study", "dsk"], "params/dsk.yaml: no such study (did you mean 'desk'?)"),
        (["train", "smoke", "basline"], "no run 'basline' (did you mean 'baseline'?)"),
        (["train", "smoke", "baseline", "--set", "model.hedas=2"], "model.hedas: no such key"),
        (["fetch", "blmip"], "did you mean 'blimp'?"),
        (["fetch", "blimp", "--mirror", "nowhere"], "--mirror: nowhere is no folder"),
        (["tokenize", "synthetc", "bytes"], "did you mean 'synthetic'?"),
        (["tokenize", "synthetic", "bpe-x"], "'bpe-x'"),
        (["train", "smoke", "baseline"], "data/tokens/synthetic"),
        (["importance", "smoke", "baseline"], "run baseline starts from new weights (training.start_from)"),
        (["importance", "smoke", "baseline", "--layers", "0"], "expected a whole number of at least 1"),
        (["evaluate", "smoke", "baseline"], "results/smoke/runs/baseline"),
        (["contamination", "smoke"], "data/raw/synthetic_pairs"),
        (["report", "smoke"], "results/smoke/runs/baseline"),
        (["compare", "smoke/baseline", "smoke/learned"], "'smoke/baseline' is no run's folder"),
        (["import", "none.gguf", "mine"], "none.gguf: no such file; expected a GGUF file"),
        (["export", "smoke/baseline", "out", "--type", "F16"], "--type: is for a GGUF file"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_a_mistake_is_told_without_traceback_and_exits_2(arguments, expected, project, capsys):
    status = main(arguments)
    told = capsys.readouterr().err
    assert status == 2, told
    assert expected in told


@pytest.mark.parametrize("arguments", [["train", "smoke", "baseline"], ["frobnicate"]])
def test_a_process_ends_with_the_status_of_a_mistake(arguments, project):
    done = stlm(*arguments, cwd=project)
    assert done.returncode == 2, done.stderr
    assert "error" in done.stderr and "Traceback" not in done.stderr


def test_outside_a_project_the_error_says_where_to_be(tmp_path):
    done = stlm("fetch", "blimp", cwd=tmp_path)
    assert done.returncode == 2
    assert "run it in the project's top folder" in done.stderr


LOCALES = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize(
    ("locale", "arguments", "status"),
    [
        ("C", ["study", "eigen"], 0),
        ("C", ["study", "eigen", "--set", "model.größe=2"], 2),
        ("C", ["use", "eigen"], 0),
        ("C", ["compare", "grün/a", os.fsdecode(b"gr\xfcn/b")], 2),
        ("latin-1", ["sizes", "10M"], 0),
        ("latin-1", ["compare", "grün/a", os.fsdecode(b"gr\xfcn/b")], 2),
    ]
    + [
        pytest.param("latin-1", arguments, status, marks=pytest.mark.exhaustive)
        for arguments, status in (
            (["study", "eigen"], 0),
            (["study", "eigen", "--set", "model.größe=2"], 2),
            (["use", "eigen"], 0),
        )
    ],
)
def test_any_text_is_printed_in_any_locale(arguments, status, locale, project):
    smoke = (project / "params" / "smoke.yaml").read_text(encoding="utf-8")
    text = smoke.replace("label: Learned PE", "label: Größe − 水 …").replace("The paper's rows", "−")
    (project / "params" / "eigen.yaml").write_text(text, encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    env = {key: value for key, value in env.items() if key not in ("PYTHONUTF8", "PYTHONIOENCODING")}
    command = [sys.executable, "-m", "stlm", *map(os.fsencode, arguments)]
    done = subprocess.run(command, cwd=project, capture_output=True, env={**env, **LOCALES[locale]})
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout if status == 0 else done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file without space, Linux's")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["--help"], "1"), (["--version"], ""), (["sizes", "10M"], "1")],
)
def test_output_that_cannot_be_written_is_an_error_in_a_line(arguments, unbuffered, project):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stlm", *arguments],
            cwd=project,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no space left" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status"), [(["sizes", "10M"], 0), (["--help"], 0), (["sizes", "x"], 2)]
)
def test_closed_streams_take_no_file_of_ours(arguments, status, project):
    """With its streams closed, a process opens its first files under their numbers."""
    command = f"exec {sys.executable} -m stlm {' '.join(arguments)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=project).returncode == status
    code = (
        "import os, sys; from stlm.terminal import tune_streams; tune_streams()\n"
        "descriptor = os.open('mine', os.O_RDWR | os.O_CREAT)\n"
        "print('library'); sys.stdout.flush(); os.write(1, b'library')\n"
        "sys.exit(descriptor < 3 or os.fstat(descriptor).st_size)"
    )
    done = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "$0" <&- >&- 2>&-', code], cwd=project)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "refused", "data/raw"), "error: data/raw: permission denied"),
        (OSError(errno.ENAMETOOLONG, "long", "x" * 300), "error: xxx"),
        (OSError(errno.ENOSPC, "full"), "error: the output cannot be written: no space left"),
        (MemoryError(), "error: not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory",
        ),
    ],
)
def test_what_the_machine_refuses_is_told_in_a_line(error, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("stlm.study.sizes.parse_sizes", fail)
    assert main(["sizes", "10M"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert len(told) < 400
    monkeypatch.setenv("STLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["sizes", "10M"])


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("x"),
        RuntimeError("x"),
        RecursionError(),
        OSError("a library's"),
        TypeError(),
    ],
)
def test_a_mistake_of_the_program_keeps_its_traceback(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("stlm.study.sizes.parse_sizes", fail)
    with pytest.raises(type(error)):
        main(["sizes", "10M"])
