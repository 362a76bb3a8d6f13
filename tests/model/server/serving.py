"""A small model on disk, the real server of it, and what the model gives when it is asked alone."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import Tokenizer, train_sentencepiece
from model.generation import generate
from model.weights import save_model
from tests.model_tools.small_models import CONFIGS, random_model
from tests.runs import PATIENCE, ROOT, environment

# A model of 64 numbers a token, so that a step takes about a millisecond.
CONFIG = dataclasses.replace(CONFIGS["mlstm"], d_model=64, n_blocks=2, ffn_dim=96, vocab_size=384)
# A request to a server that answers takes less, whatever else this machine does.
SECONDS = 120.0


def save_small_model(folder: Path) -> Path:
    """Weights with a SentencePiece tokenizer beside them; the model has more ids than the tokenizer."""
    save_model(random_model(CONFIG), CONFIG, folder)
    (folder / "tokenizer").mkdir()
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 6))) for _ in range(200)]
    text = "\n".join(" ".join(drawn.choices(words, k=8)) for _ in range(300))
    content = train_sentencepiece([text], TokenizerConfig(vocab_size=370))
    (folder / "tokenizer" / "tokenizer.model").write_bytes(content)
    return folder


class Alone:
    """The same model in this process, one prompt at a time: what the server's answers are compared with."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.load(folder / "tokenizer")
        self.model = random_model(CONFIG).eval()
        # The longest continuation that was asked for of each prompt.
        self._known: dict[tuple[int, ...], list[int]] = {}

    def ids(self, prompt: str | Sequence[int], count: int) -> list[int]:
        """The likeliest `count` new tokens at most; the end of a document included."""
        end = self.tokenizer.eod_id
        tokens = (end, *self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
        known = self._known.get(tokens, [])
        if len(known) < count and end not in known:
            known = self._continued([tokens], count)[0]
            self._known[tokens] = known = known[: known.index(end) + 1] if end in known else known
        return known[:count]

    def _continued(self, prompts: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
        settings = {"temperature": 0, "stop_token": self.tokenizer.eod_id, "vocab_size": self.tokenizer.vocab_size}
        return generate(self.model, prompts, max_new_tokens=count, **settings).tolist()

    def prompts(self, count: int) -> tuple[list[int], list[int]]:
        """A prompt that `count` tokens continue without an end of the document, and one that such an end follows."""
        end, prompts = self.tokenizer.eod_id, [(token,) for token in range(20, 52)]
        found: dict[bool, tuple[int, ...]] = {}
        for prompt, new in zip(prompts, self._continued(prompts, count), strict=True):
            self._known[prompt] = new[: new.index(end) + 1] if end in new else new
            found.setdefault(end in new, prompt)
        return list(found[False]), list(found[True])

    def text(self, prompt: str | Sequence[int], count: int) -> str:
        """The text that they add."""
        tokenizer = self.tokenizer
        before = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        new = self.ids(prompt, count)
        return tokenizer.decode([*before, *new])[len(tokenizer.decode(before)) :]


@dataclasses.dataclass
class Server:
    """A process of `python -m model serve`."""

    process: subprocess.Popen[str]
    port: int
    errors: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, bytes]:
        status, _, body = self.request("GET", path)
        return status, body

    def post(self, path: str, body: dict[str, Any] | bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers (in small letters) and the JSON of the answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, received, answer = self.request("POST", path, content, {"Content-Type": "application/json", **headers})
        return status, received, json.loads(answer)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        page = self.get("/metrics")[1].decode()
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, flags=re.M)
        assert values, f"no {name} in {page}"
        return sum(map(float, values))

    def wait_until(self, name: str, value: float) -> None:
        """Until the metric `name` has `value`."""
        deadline = time.monotonic() + SECONDS
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def wait_until_idle(self, slots: int) -> None:
        """Until nothing is left of any request: every slot is free, nothing waits."""
        self.wait_until("xlstm_requests_open", 0)
        self.wait_until("xlstm_sequences_admitted", 0)
        self.wait_until("xlstm_slots_free", slots)
        self.wait_until("xlstm_sequences_waiting", 0)

    def completion(self, prompt: object, **fields: Any) -> Any:
        """The answer to a greedy completion, which must be given."""
        body = {"model": "small", "prompt": prompt, "temperature": 0, **fields}
        status, _, answer = self.post("/v1/completions", body)
        assert status == 200, answer
        return answer


@contextlib.contextmanager
def serving(folder: Path, log: Path, *settings: str, program: Sequence[str] = ("-m", "model")) -> Iterator[Server]:
    """The server of the weights in `folder`, called "small", once it answers; killed at the end if it still runs.

    `program`: what Python is to run in the place of our command.
    """
    command = [sys.executable, *program, "serve", f"checkpoint={folder}", "name=small", "port=0", *settings]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving small at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, f"{line}{process.stdout.read()}{log.read_text()}"
        yield Server(process, int(found[1]), log)
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def open_stream(server: Server, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing was read.

    `receive_buffer`: bytes that the system takes for a reader that does not read.
    """
    content = json.dumps({"model": "small", "temperature": 0, "stream": True, **body}).encode()
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(SECONDS)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(head(f"Content-Length: {len(content)}") + content)
    return connection


def head(length: str) -> bytes:
    """Of a POST to /v1/completions; `length`: the header that says how long the body is."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", length, "", ""]
    return "\r\n".join(lines).encode()


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
