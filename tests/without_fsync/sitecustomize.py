"""Read by the Python processes that tests start, before anything else: none of them waits for the disk."""

import os

os.fsync = lambda descriptor: None
