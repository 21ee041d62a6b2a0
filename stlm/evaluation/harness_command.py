"""The commands `lm_eval` and `lm-eval`, which also know `--model stlm`.

lm_eval finds models in its own list alone: it reads no entry points of other packages. So our package
installs commands of the same names, which add our model to the list and are lm_eval's from there on. Where
lm_eval was installed later than this package, its commands have taken the place of ours:
`python -m stlm.evaluation.harness_command` is the same, whatever was installed last.
"""

from __future__ import annotations

import sys

from stlm.cpu_runtime import tune_process
from stlm.errors import UserError
from stlm.terminal import tune_streams


def main() -> int:
    """lm_eval's command line with our model; the exit status."""
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
