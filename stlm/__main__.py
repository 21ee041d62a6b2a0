"""``python -m stlm`` is the command ``stlm``."""

import sys

from stlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
