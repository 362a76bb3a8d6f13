"""Many clients at once, well and badly behaved: no wrong answer, no slot lost, no memory kept."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import pytest

from tests.model.server.serving import Alone, Server, resident_bytes, serving

SLOTS, QUEUE, MAX_PROMPT = 8, 40, 200
MIB = 2**20


@dataclass
class Tally:
    """What became of the requests, and how much memory the server had meanwhile."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


class Clients:
    """Clients that ask `server` for continuations of which `expected` has the text alone."""

    def __init__(self, server: Server, expected: list[tuple[list[int], str, str]], seed: int):
        self._server, self._expected = server, expected
        self._random = random.Random(seed)
        self.tally = Tally()

    async def run(self, requests: int, clients: int) -> None:
        left = iter(range(requests))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self._server.url, timeout=300, limits=limits, trust_env=False) as http:

            async def client() -> None:
                for number in left:
                    await self._ask(http)
                    if number % max(1, requests // 20) == 0:
                        self.tally.memory.append(resident_bytes(self._server.process.pid))

            await asyncio.gather(*(client() for _ in range(clients)))

    async def _ask(self, http: httpx.AsyncClient) -> None:
        kinds = {
            self._whole: 30,
            self._stream: 30,
            self._slow_reader: 6,
            self._leaves: 18,
            self._leaves_whole: 4,
            self._malformed: 6,
            self._too_long: 6,
        }
        [kind] = self._random.choices(list(kinds), list(kinds.values()))
        self.tally.outcomes[await kind(http)] += 1

    def _body(self, **fields: object) -> tuple[dict, str, str]:
        prompt, text, reason = self._random.choice(self._expected)
        body = {"model": "small", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, **fields}
        return body, text, reason

    def _compare(self, found: tuple[str, str | None], expected: tuple[str, str], kind: str) -> str:
        if found != expected:
            self.tally.wrong.append(f"{kind}: {found} is not {expected}")
        return kind

    async def _whole(self, http: httpx.AsyncClient) -> str:
        body, *expected = self._body()
        response = await http.post("/v1/completions", json=body)
        if response.status_code == 429:
            return await self._refused(response)
        [choice] = response.json()["choices"]
        return self._compare((choice["text"], choice["finish_reason"]), tuple(expected), "whole")

    async def _refused(self, response: httpx.Response) -> str:
        seconds = int(response.headers["retry-after"])
        assert 1 <= seconds <= 60
        await asyncio.sleep(seconds)
        return "too many"

    async def _stream(self, http: httpx.AsyncClient, pause: float = 0.0, kind: str = "stream") -> str:
        body, *expected = self._body(stream=True, logprobs=3 if pause else None)
        text, reason, done = "", None, False
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                return await self._refused(response)
            async for line in response.aiter_lines():
                await asyncio.sleep(self._random.random() * pause)
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    [choice] = json.loads(line[6:])["choices"]
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
        if not done:
            self.tally.wrong.append(f"{kind}: the stream broke off")
        return self._compare((text, reason), tuple(expected), kind)

    async def _slow_reader(self, http: httpx.AsyncClient) -> str:
        return await self._stream(http, pause=0.05, kind="slow reader")

    async def _leaves(self, http: httpx.AsyncClient) -> str:
        """Reads some of a stream, or nothing, and closes the connection."""
        body, text, _ = self._body(stream=True)
        lines, read = self._random.randrange(TOKENS), ""
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                return await self._refused(response)
            async for line in response.aiter_lines():
                if lines <= 0:
                    break
                lines -= 1
                if line.startswith("data: {"):
                    read += json.loads(line[6:])["choices"][0]["text"]
        if not text.startswith(read):
            self.tally.wrong.append(f"left: {read} is not the beginning of {text}")
        return "left"

    async def _leaves_whole(self, http: httpx.AsyncClient) -> str:
        """Does not wait for an answer that comes as a whole."""
        body, *_ = self._body()
        try:
            await asyncio.wait_for(http.post("/v1/completions", json=body), self._random.random() * 0.05)
        except TimeoutError:
            return "left before the answer"
        return "answered before it left"

    async def _malformed(self, http: httpx.AsyncClient) -> str:
        content = self._random.choice([b"{", b"[]", b"\xff\xfe", b'{"model": "small", "prompt": 3}', b"[" * 10_000])
        response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
        return "malformed"

    async def _too_long(self, http: httpx.AsyncClient) -> str:
        tokens = self._random.choice([MAX_PROMPT + 1, 30_000])
        body, *_ = self._body(prompt=[9] * tokens)
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == (400 if tokens == MAX_PROMPT + 1 else 413)
        assert "error" in response.json()
        return "too long"


TOKENS = 24


def expected_of(alone: Alone, count: int) -> list[tuple[list[int], str, str]]:
    """Prompts of many lengths with what the model adds to each alone, and why that ends."""
    drawn, found = random.Random(0), []
    for _ in range(count):
        prompt = [drawn.randrange(3, 370) for _ in range(drawn.randrange(1, MAX_PROMPT))]
        ids = alone.ids(prompt, TOKENS)
        found.append((prompt, alone.text(prompt, TOKENS), "stop" if ids[-1] == alone.tokenizer.eod_id else "length"))
    return found


def hammer(weights, alone, log, requests: int, clients: int, prompts: int) -> tuple[Tally, float, int]:
    """What became of the requests; seconds they took; resident bytes when all is over."""
    limits = [f"slots={SLOTS}", f"queue={QUEUE}", f"max_prompt_tokens={MAX_PROMPT}", "max_body_bytes=60000"]
    with serving(weights, log, *limits, "prefill_tokens=64") as server:
        crowd = Clients(server, expected_of(alone, prompts), seed=0)
        asyncio.run(crowd.run(clients, clients))
        began = time.monotonic()
        crowd.tally.memory.clear()
        asyncio.run(crowd.run(requests, clients))
        seconds = time.monotonic() - began
        server.wait_until_idle(SLOTS)
        assert server.metric("process_open_fds") < 40
        answers = server.metric("xlstm_sequences_total")
        assert answers > 0 and server.process.poll() is None
        # A drain that has nothing to wait for.
        left = resident_bytes(server.process.pid)
        server.process.terminate()
        assert server.process.wait(60) == 0 and log.read_text() == ""
    return crowd.tally, seconds, left


@pytest.mark.slow
def test_hundreds_of_requests_at_once(weights, alone, tmp_path):
    tally, _, _ = hammer(weights, alone, tmp_path / "stderr", requests=200, clients=20, prompts=12)
    assert tally.wrong == []
    assert {"whole", "stream", "slow reader", "left", "malformed", "too long"} <= tally.outcomes.keys()


@pytest.mark.long
def test_ten_thousand_requests_of_64_clients(weights, alone, tmp_path, capsys):
    tally, seconds, left = hammer(weights, alone, tmp_path / "stderr", requests=10_000, clients=64, prompts=100)
    mebibytes = [round(value / MIB) for value in (*tally.memory, left)]
    with capsys.disabled():
        print(f"\n{seconds:.0f} s, {dict(tally.outcomes)}, resident MiB {mebibytes}")
    assert tally.wrong == [] and sum(tally.outcomes.values()) == 10_064
    assert all(
        tally.outcomes[kind] > 100 for kind in ("whole", "stream", "slow reader", "left", "malformed", "too long")
    )
    # Flat: the last quarter has no more than the second had, but for what an allocator rounds up.
    second, last = tally.memory[5:10], tally.memory[-5:]
    assert max(last) < max(second) + 32 * MIB
