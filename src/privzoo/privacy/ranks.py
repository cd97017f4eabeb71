"""Several processes ("ranks") on one run: each treats its share of one Poisson draw, and sums are added up once a release.

Between two releases ranks hold the same weights, draw the same examples and add the same noise: draws and noise are keyed
streams of one run key, and noise goes on the total, after the sums were added up, once. So a release is the very mechanism
that one process makes, whatever the number of ranks; what they make of different shares differs by rounding alone.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from privzoo.errors import RunLost, UserError, first_line

BUCKET = 1 << 23  # values that travel together: 32 MiB of float32
PATIENCE = timedelta(days=7)  # a rank may wait long for another's share or scores; one that died closes its connection
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run; by default it is alone, and nothing below does or costs anything.

    Attributes:
        rank: number of this process, from 0.
        count: number of all processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process keeps the run folder: ledger, checkpoints, record."""
        return self.rank == 0

    def share(self, drawn: np.ndarray) -> np.ndarray:
        """What this rank treats of a draw that all ranks hold in the same order: each unit is of exactly one rank's share.

        >>> [Ranks(rank, 3).share(np.arange(4)).tolist() for rank in range(3)]
        [[0, 3], [1], [2]]
        """
        return drawn[self.rank :: self.count]

    def add_up(self, sums: Mapping[str, Tensor]) -> None:
        """Replaces each tensor, in place, by the total over all ranks: the same bits on every rank.

        Args:
            sums: contiguous, with the same names, shapes and types in the same order on every rank. What is dealt out to
                ranks is left as it is: it was added up when it was dealt out.
        Raises:
            RankLost: if another rank has ended.
        """
        if self.count == 1:
            return
        for bucket in _buckets(value for value in sums.values() if not isinstance(value, DTensor)):
            flat = bucket[0] if len(bucket) == 1 else torch.cat([value.view(-1) for value in bucket])
            with _together():
                dist.all_reduce(flat)
            if len(bucket) > 1:
                for value, part in zip(bucket, flat.split([value.numel() for value in bucket]), strict=True):
                    value.copy_(part.view_as(value))

    def together(self, alike: str, part: str) -> str:
        """SHA-256 of a fingerprint and those of all ranks' parts: the same on every rank, where `alike` is.

        Args:
            alike: of what every rank holds whole.
            part: of what this one holds a part of.
        Raises:
            RankLost: if another rank has ended.
        """
        return sha256(" ".join([alike, *self.all_of(part)]).encode()).hexdigest()

    def any_stops(self, stop: bool, weights: str) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer, at the same place.

        Args:
            stop: whether this one was.
            weights: fingerprint (hexadecimal SHA-256) of what the next sum will be taken at.
        Raises:
            RuntimeError: if the weights are not the same on every rank: their sums would be of different queries.
            RankLost: if another rank has ended.
        """
        if self.count == 1:
            return stop
        own = torch.tensor([int(stop), *bytes.fromhex(weights)], dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with _together():
            dist.all_gather(found, own)
        if any(not torch.equal(each[1:], own[1:]) for each in found):
            raise RuntimeError("Weights are not the same on every rank: sums of different queries would be added up.")
        return any(bool(each[0]) for each in found)

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank. What other ranks give is not looked at.

        Raises:
            RankLost: if another rank has ended.
        """
        if self.count == 1:
            return value
        held: list[Any] = [value]
        with _together():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def all_of(self, value: T) -> list[T]:
        """The values of all ranks, on every rank.

        Raises:
            RankLost: if another rank has ended.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _together():
            dist.all_gather_object(found, value)
        return found

    def require_equal(self, what: str, value: str) -> None:
        """Raises UserError on every rank if `value` is not the same on all."""
        found = self.all_of(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise UserError(f"Expected the same {what} on every rank, found others on rank {rank} than on rank 0.")


ALONE = Ranks()


def held_here(value: Tensor) -> Tensor:
    """Of a tensor that is dealt out to ranks the part that this one holds, which is all of it otherwise."""
    return value.to_local() if isinstance(value, DTensor) else value


def begins_here(value: Tensor) -> int:
    """Of a tensor that is dealt out along its first dimension the place where this rank's part begins, in the whole tensor
    laid out flat; 0 of a whole one.

    Raises:
        ValueError: if it is dealt out otherwise.
    """
    if not isinstance(value, DTensor):
        return 0
    if tuple(value.placements) != (Shard(0),):
        raise ValueError(f"Expected a tensor dealt out along its first dimension, found {value.placements}.")
    rows = -(-value.shape[0] // value.device_mesh.size())  # the last ranks may hold fewer, or none
    first = min(rows * value.device_mesh.get_local_rank(), value.shape[0])
    if value.to_local().shape[0] != min(rows, value.shape[0] - first):
        raise ValueError(f"Expected {rows} rows a rank, found {value.to_local().shape[0]} from row {first} on.")
    return first * math.prod(value.shape[1:])


def join_ranks() -> Ranks:
    """Meet the other ranks as the environment says, which is that of torchrun: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Without these variables a process is alone. Tensors on a CPU travel by gloo, those on a GPU by NCCL.

    Raises:
        RankLost: if they do not meet.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return ALONE
    if dist.is_initialized():  # a sweep's next run
        return Ranks(dist.get_rank(), count)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=PATIENCE)
    return Ranks(dist.get_rank(), count)


def leave_ranks() -> None:
    """Lets the other ranks know that this process takes no further part; afterwards another group may be joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RankLost(RunLost):
    """Another process of the run is not there any more; its own message tells more than this one."""


@contextmanager
def telling_who_is_lost() -> Iterator[None]:
    """Where a library exchanges tensors: an error by which it tells that another process has gone becomes `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, dist.DistError) or any(words in str(error) for words in ("closed by peer", "reset by peer"))
        if not gone:
            raise
        raise _lost(error) from error


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of all kinds that torch.distributed has
        raise _lost(error) from error


def _lost(error: RuntimeError) -> RankLost:
    return RankLost(f"Another process of the run has ended ({first_line(error)}): go on with resume=<run folder>.")


def _buckets(values: Any) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, together at most `BUCKET` values (or one alone)."""
    bucket: list[Tensor] = []
    for value in values:
        alike = bucket and (value.dtype, value.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(each.numel() for each in bucket) + value.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(value)
    if bucket:
        yield bucket
