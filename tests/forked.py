"""Processes that train together, forked from one that has imported torch: each begins at once.

With `torchrun` three processes import torch, which takes longer than what they train here.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed", "dvclive", "stlm.cli", "stlm.training.loop"])


def in_processes(
    work: Callable[..., None], *arguments: str, size: int = 2, store: bool = True
) -> tuple[list[int], str]:
    """Call `work(*arguments)` in `size` processes, with the variables of torchrun, in the working directory.

    `work`: a function of a module. `store`: whether this process holds their common store, as torchrun does,
    or the first of them. Returns the processes' exit statuses (negative: the signal that ended it), and what
    they said on stderr. Hanging is a failure.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    if store:
        held = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # until the end
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    said = [Path(f"said-{rank}.txt").absolute() for rank in range(size)]
    group = []
    for rank, file in enumerate(said):
        own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        group.append(_CONTEXT.Process(target=_begin, args=(own, file, work, arguments)))
        group[-1].start()
    try:
        for process in group:
            process.join(600)
    finally:
        for process in group:
            process.kill()
            process.join()
    if store:
        del held
    return [process.exitcode for process in group], "".join(file.read_text() for file in said)


def _begin(
    variables: Mapping[str, str], said: Path, work: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    os.environ.update(variables)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    work(*arguments)
