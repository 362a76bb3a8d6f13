"""The batches of a run's optimizer steps, read ahead by threads."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from data_pipeline.ordering.left_out import Windows, begin_of_step
from data_pipeline.reading.batch import Batch, Columns


class Samples(Protocol):
    """What a loader needs of a stream: samples by their numbers in the run."""

    sequence_length: int

    def batch(self, first_sample: int | np.ndarray, count: int | None = None, columns: Columns | None = None) -> Batch:
        """Samples first_sample ... first_sample + count - 1, or these columns of them."""


class StepLoader:
    """The micro-batches of one replica, optimizer step after optimizer step, read ahead by `workers` threads.

    Step t takes samples [first_sample + t * global_batch_size, ...) of the run; replica r of R the r-th contiguous part
    of it, cut into micro-batches; sequence rank q of Q the q-th slice of each of its samples. Each item is the list of
    micro-batches of one step; at most `prefetch_steps` steps are read ahead. An error of a thread is raised from
    `next`, at its step. `consumed_samples` counts the samples of the whole run up to the last step handed out, those
    that are `left_out` (`ordering/left_out.py`) before it among them, and is all that has to be kept to go on. Close it
    (or use it as a context manager) to end the threads.
    """

    def __init__(
        self,
        stream: Samples,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        replica: int,
        replicas: int,
        first_sample: int,
        prefetch_steps: int = 2,
        workers: int = 1,
        sequence_rank: int = 0,
        sequence_ranks: int = 1,
        left_out: Windows = (),
    ):
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (replicas * micro_batch_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of replicas {replicas} x micro_batch_size "
                f"{micro_batch_size}; change one of them"
            )
        if not 0 <= replica < replicas or first_sample < 0 or prefetch_steps < 1 or workers < 1:
            raise ValueError(
                f"need 0 <= replica < replicas, first_sample >= 0, prefetch_steps >= 1 and workers >= 1, got "
                f"{replica}, {replicas}, {first_sample}, {prefetch_steps}, {workers}"
            )
        self.consumed_samples = first_sample
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._share = global_batch_size // replicas
        self._columns = Columns.of_rank(stream.sequence_length, sequence_rank, sequence_ranks)
        self._replica = replica
        self._left_out = left_out
        self._next = first_sample
        self._failure: BaseException | None = None
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(workers, thread_name_prefix="step-loader")
        # Each with the position behind it.
        self._steps: deque[tuple[int, Future[list[Batch]]]] = deque()
        for _ in range(prefetch_steps):
            self._read_ahead()

    def _read_ahead(self) -> None:
        assert self._threads is not None
        first = begin_of_step(self._next, self._global_batch_size, self._left_out)
        self._next = first + self._global_batch_size
        self._steps.append((self._next, self._threads.submit(self._load, first + self._replica * self._share)))

    def _load(self, first: int) -> list[Batch]:
        share = self._stream.batch(first, self._share, self._columns)
        size = self._micro_batch_size
        return [share.rows(begin, begin + size) for begin in range(0, self._share, size)]

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> list[Batch]:
        if self._failure is not None:
            raise self._failure
        if self._threads is None:
            raise RuntimeError("StepLoader is closed")
        try:
            behind, future = self._steps.popleft()
            step = future.result()
        except Exception as error:
            self._failure = error
            raise
        self._read_ahead()
        self.consumed_samples = behind
        return step

    def close(self) -> None:
        """End the threads; may be called more than once."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
