"""The thread between the event loop and the running batch."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from model.generation.batch import ContinuousBatch, Token
from model.generation.sampling import SamplingSettings
from model.server.worker import BatchWorker, Occupancy
from tests.model_tools.small_models import CONFIGS, random_model

GREEDY = SamplingSettings(12, temperature=0)


@dataclasses.dataclass(eq=False)
class Job:
    prompt_tokens: Sequence[int]
    settings: SamplingSettings = GREEDY
    tokens: list[int] = dataclasses.field(default_factory=list)
    errors: list[Exception] = dataclasses.field(default_factory=list)
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def take(self, tokens: Sequence[Token]) -> None:
        self.tokens += [token.token for token in tokens]
        if tokens[-1].finish_reason is not None:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()


@pytest.fixture
def batch():
    return ContinuousBatch(random_model(CONFIGS["mlstm"]), 2, prefill_tokens=8)


def with_worker(batch, scenario, on_failure=lambda: None):
    """Run the coroutine function `scenario` with a worker of `batch`."""

    async def run() -> BatchWorker:
        worker = BatchWorker(batch)
        worker.start(asyncio.get_running_loop(), on_failure)
        try:
            await asyncio.wait_for(scenario(worker), 300)
        finally:
            await asyncio.to_thread(worker.stop)
        return worker

    return asyncio.run(run())


def test_jobs_get_their_own_tokens_and_leave_nothing(batch):
    expected = []
    for prompt in ([3, 4], [5] * 20, [6]):
        handle, tokens = batch.add(prompt, GREEDY), []
        while len(tokens) < 12:
            tokens += [token.token for token in batch.step() if token.request == handle]
        expected.append(tokens)

    async def scenario(worker: BatchWorker) -> None:
        jobs = [Job([3, 4]), Job([5] * 20), Job([6])]
        for job in jobs:
            worker.submit(job)
        for job, tokens in zip(jobs, expected, strict=True):
            await job.ended.wait()
            assert (job.tokens, job.errors) == (tokens, [])

    worker = with_worker(batch, scenario)
    assert worker.occupancy == Occupancy(waiting=0, running=0, free_slots=2) and worker.failure is None


def test_cancelled_jobs_free_their_slots_wherever_they_are(batch):
    endless = SamplingSettings(10**9, temperature=0)

    async def scenario(worker: BatchWorker) -> None:
        jobs = [Job([token], endless) for token in (3, 4, 5, 6)]
        for job in jobs:
            worker.submit(job)
        while worker.occupancy != Occupancy(waiting=2, running=2, free_slots=0):
            await asyncio.sleep(0.001)
        # One that waits, one that runs; one that was never sent, and the first once more.
        for job in (jobs[3], jobs[0], Job([9]), jobs[3]):
            worker.cancel(job)
        while worker.occupancy != Occupancy(waiting=0, running=2, free_slots=0):
            await asyncio.sleep(0.001)
        for job in jobs:
            worker.cancel(job)
        while worker.occupancy != Occupancy(waiting=0, running=0, free_slots=2):
            await asyncio.sleep(0.001)

    with_worker(batch, scenario)


def test_a_job_that_the_batch_refuses_fails_alone(batch):
    async def scenario(worker: BatchWorker) -> None:
        wrong, right = Job([10**6]), Job([3])
        worker.submit(wrong)
        worker.submit(right)
        await wrong.ended.wait()
        await right.ended.wait()
        assert "the prompt holds ids" in str(wrong.errors[0]) and len(right.tokens) == 12

    with_worker(batch, scenario)


def test_a_step_that_fails_ends_every_job_and_tells(batch, monkeypatch, caplog):
    """As a GPU that is out of memory or broken does."""
    failures = []

    async def scenario(worker: BatchWorker) -> None:
        first = Job([3], SamplingSettings(10**9, temperature=0))
        worker.submit(first)
        while not first.tokens:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(batch, "step", lambda: 1 / 0)
        await first.ended.wait()
        late = Job([4])
        worker.submit(late)
        await late.ended.wait()
        for job in (first, late):
            worker.cancel(job)
            assert isinstance(job.errors[0], ZeroDivisionError)

    worker = with_worker(batch, scenario, lambda: failures.append(1))
    assert failures == [1] and isinstance(worker.failure, ZeroDivisionError)
    assert "the batch failed" in caplog.text


def test_the_size_of_a_state_is_what_it_is_now():
    """Attention's caches get more room with the text; recurrent states do not."""
    for name, grows in (("mlstm", False), ("hybrid", True)):
        batch = ContinuousBatch(random_model(CONFIGS[name]), 2, prefill_tokens=64)

        async def scenario(worker: BatchWorker) -> None:
            job = Job([3] * 600)
            worker.submit(job)
            await job.ended.wait()

        before = batch.state_bytes_per_slot
        worker = with_worker(batch, scenario)
        assert before > 0 and worker.state_bytes == batch.state_bytes_per_slot
        assert (worker.state_bytes > before) == grows


def test_a_worker_with_nothing_to_do_ends_when_told(batch):
    async def scenario(worker: BatchWorker) -> None:
        await asyncio.sleep(0)

    with_worker(batch, scenario)
