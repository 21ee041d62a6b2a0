"""The commands `lm_eval` and `lm-eval`, with `--model stlm` added.

lm_eval finds models only in its own list; it reads no entry points of other packages. This package therefore
installs commands of the same names, which add the model to the list and call lm_eval. If lm_eval was
installed later than this package, its commands have replaced these; `python -m
stlm.evaluation.harness_command` always works.
"""

from __future__ import annotations

import sys

from stlm.cpu_runtime import tune_process
from stlm.errors import UserError
from stlm.terminal import tune_streams


def main() -> int:
    """Run lm_eval's command line with this model; returns the exit status."""
    tune_streams()
    tune_process()
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print(
            "error: the reference harness is not installed; run: pip install 'stlm[harness]'", file=sys.stderr
        )
        return 2
    model_registry.register("stlm", target="stlm.evaluation.harness_model:StlmLM")
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
