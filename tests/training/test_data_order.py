"""The order of data depends on the seed and the epoch only: not on shards, processes or their number."""

from __future__ import annotations

import numpy as np
import pytest
from counting_corpus import sentences, write_corpus

from stlm.errors import UserError
from stlm.tokens.batches import Batches
from stlm.tokens.tokenize import tokenize_corpus
from stlm.training.config import TrainingConfig
from stlm.training.distributed import Group


def recipe(batch_size, accumulation):
    return TrainingConfig(batch_size=batch_size, accumulation=accumulation)


@pytest.mark.parametrize(("shard_bytes", "workers"), [(500, 1), (3000, 3)])
def test_another_size_of_shards_gives_the_same_batches(shard_bytes, workers, tokens_folder, tmp_path):
    write_corpus(tmp_path / "raw" / "tiny", sentences(400))
    folder = tmp_path / "tiny" / "bytes"
    tokenize_corpus(
        tmp_path / "raw" / "tiny",
        folder,
        "bytes",
        tmp_path,
        shard_bytes=shard_bytes,
        workers=workers,
        progress=False,
    )
    assert len(list(folder.glob("train-*"))) > len(list(tokens_folder.glob("train-*")))
    one, other = (Batches(place, 32, 4, seed=5) for place in (tokens_folder, folder))
    for step in (0, 1, 50, 200):  # two epochs of 342 chunks and more
        np.testing.assert_array_equal(one.batch(step), other.batch(step))


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "size"),
    [(4, 1, 1), (4, 1, 2), (4, 1, 4), (2, 4, 2), (2, 4, 4), (2, 4, 8), (3, 4, 2), (6, 4, 12), (24, 20, 16)],
)
def test_processes_share_a_step_without_rest_or_overlap(batch_size, accumulation, size, tokens_folder):
    """Together they read the very rows that one process reads, each of them once, and equally many."""
    config = recipe(batch_size, accumulation)
    batches = Batches(tokens_folder, 32, batch_size, seed=0)
    whole = [row.tobytes() for micro in range(accumulation) for row in batches.batch(7, micro, accumulation)]
    shares = [Group(rank, size).share(config) for rank in range(size)]
    read = [
        [row.tobytes() for m in share.micros for row in batches.batch(7, m, accumulation)[share.rows]]
        for share in shares
    ]
    assert sorted(row for rows in read for row in rows) == sorted(whole)
    assert {len(rows) for rows in read} == {batch_size * accumulation // size}
    # The weight of a micro-batch's mean in the step's mean: as many of them as there are make one.
    assert all(len(share.micros) * size == accumulation * share.parts for share in shares)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "size", "nearest"),
    [(4, 1, 3, 2), (4, 1, 8, 4), (3, 5, 7, 5), (1, 1, 2, 1)],
)
def test_processes_that_cannot_share_evenly_are_told(batch_size, accumulation, size, nearest):
    with pytest.raises(
        UserError,
        match=rf"{size} processes.*training.accumulation: {accumulation} x training.batch_size: "
        rf"{batch_size} .*nearest number of processes that can: {nearest}$",
    ):
        Group(0, size).share(recipe(batch_size, accumulation))
