"""Processes that train one run together, started by `torchrun`; a single process is a group of one.

Each process holds the whole model and works on its share of every step's rows. Gradients are summed once per
step, so all processes make the same update. They communicate by gloo on CPUs and by NCCL between GPUs.
"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stlm.errors import Interrupted, UserError
from stlm.training.config import TrainingConfig
from stlm.training.lifeline import LOST, Exit, Lifeline
from stlm.training.signals import STOPPING

# The variables that torchrun sets for the processes it starts.
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# gloo reports a lost connection as a plain RuntimeError with one of these messages.
_GLOO_LOST = re.compile(
    r"connection (closed|reset|refused)|socket closed|(read|write) error|broken pipe|timed out|timeout",
    re.IGNORECASE,
)


class LostPeer(UserError):
    """Another process of the group ended while this process waited for it."""


@dataclass(frozen=True)
class Share:
    """A process's share of a step: these micro-batches, these rows of each; one of `parts` equal shares."""

    micros: range
    rows: slice
    parts: int


@dataclass(frozen=True)
class Group:
    """The processes that train a run, seen from one of them. Rank 0 leads: only the leader writes files."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def share(self, config: TrainingConfig) -> Share:
        """This process's share of every step: whole micro-batches if possible, otherwise some rows of each.

        The shares of a group are disjoint, equal in size, and together make up the step's rows, whatever the
        number of processes. Raises ``UserError`` if `batch_size` x `accumulation` cannot be divided evenly.
        """
        turns = math.gcd(self.size, config.accumulation)
        parts = self.size // turns
        if config.batch_size % parts:
            valid = [n for n in range(1, config.batch_size * config.accumulation + 1) if _divides(n, config)]
            nearest = min(valid, key=lambda n: abs(n - self.size))
            raise UserError(
                f"{self.size} processes cannot share a step evenly: training.accumulation: "
                f"{config.accumulation} x training.batch_size: {config.batch_size} sequences; nearest number "
                f"of processes that can: {nearest}"
            )
        turn, part = divmod(self.rank, parts)
        width = config.batch_size // parts
        return Share(range(turn, config.accumulation, turns), slice(part * width, (part + 1) * width), parts)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes in one exchange; all get the same bits."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        _exchange(lambda: dist.all_reduce(flat))
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def sum_over_rows(self, tensor: Tensor, share: Share) -> Tensor:
        """The sum of `tensor` over the processes that work on rows of the same micro-batch.

        All processes must call it equally often. `share` is this process's.
        """
        if share.parts == 1:
            return tensor
        # Processes with other micro-batches take part in the exchange, each group in a place of its own.
        turn, turns = share.micros.start, share.micros.step
        sums = tensor.new_zeros(turns, *tensor.shape)
        sums[turn] = tensor
        self.sum([sums])
        return sums[turn]

    def largest(self, value: int) -> int:
        """The largest of the processes' values. Waits for the processes, not for a GPU."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.int64)
        _exchange(lambda: dist.all_reduce(held, dist.ReduceOp.MAX))
        return int(held)

    def agrees(self, value: int) -> bool:
        """Whether all processes hold the same value."""
        return self.largest(value) == -self.largest(-value)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.largest(0)


def _divides(size: int, config: TrainingConfig) -> bool:
    return config.batch_size % (size // math.gcd(size, config.accumulation)) == 0


def _exchange(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise LostPeer(f"{LOST} ({str(error).splitlines()[0]})") from None


def _lost(error: RuntimeError) -> bool:
    kinds = dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError
    return isinstance(error, kinds) or bool(_GLOO_LOST.search(str(error)))


@contextmanager
def processes() -> Iterator[Group]:
    """The group in which `torchrun` started this process; without torchrun, a group of one.

    If one process fails, all end. The process that first reports a ``UserError`` raises it; the others end
    silently with the same exit status. The leader raises ``Interrupted``.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Group()
        return
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set: start several processes with torchrun, "
            "as docs/clusters.md says, or unset WORLD_SIZE"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        _take_gpu(int(os.environ["LOCAL_RANK"]), size)
    exit_ = Exit()
    store, rank = _meet(cuda, size)
    group = Group(rank, size)
    lifeline = Lifeline(rank, size, lambda: _first_to_report(store))
    try:
        yield group
    except Interrupted as stop:
        _ignore_signals()
        exit_.status = stop.status
        with suppress(LostPeer):  # the other process ended first; the state is saved
            group.wait()
            lifeline.farewell()
        if group.leads:
            raise
        raise SystemExit(stop.status) from None
    except BaseException as error:
        _ignore_signals()
        lifeline.release()
        exit_.status = (
            2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        )
        # Claim this before the process ends and the others notice, so the cause is reported, not its effects.
        first = _first_to_report(store)
        # NCCL would wait for the failed processes.
        if not cuda:
            dist.destroy_process_group()
        if first or not isinstance(error, UserError):
            raise
        raise SystemExit(2) from None
    if lifeline.farewell():
        dist.destroy_process_group()
    else:
        exit_.status = 0


def _meet(cuda: bool, size: int) -> tuple[dist.Store, int]:
    """Join the other processes; returns the shared store and this process's rank."""
    # NCCL's watchdog would abort the process (SIGABRT) as soon as another one is lost; the lifeline ends
    # it with the documented exit status instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        # gloo, used together with NCCL, carries messages that must not wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(
            f"the {size} processes of this training did not find one another at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: did one end, or is the address "
            f"unreachable? ({str(error).splitlines()[0]})"
        ) from None
    return store, rank


def _first_to_report(store: dist.Store) -> bool:
    """Whether this process is the first to report why the group ends; True if no other can be asked."""
    try:
        return store.add("stlm/told", 1) == 1
    except RuntimeError:
        return True


def _ignore_signals() -> None:
    """Ignore signals from now on: this process is about to end, and may still have to report why.

    When one process has ended, torchrun signals the others.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _take_gpu(local_rank: int, size: int) -> None:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU, of which it has {gpus}: start at most as "
            f"many with torchrun --nproc_per_node={gpus} (found {size} processes in all)"
        )
    torch.cuda.set_device(local_rank)
