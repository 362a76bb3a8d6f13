"""Our server as a contender of benchmarks/inference.py: every row of a batch is a client of its own.

The server is `python -m model serve` with as many slots as the batch has rows, on weights that were written for it.
Clients ask for whole answers by tokens, greedily. Its tokenizer is a small one, so only ids below that one's are drawn;
the model computes the scores of all.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import train_sentencepiece
from model.language_model import LanguageModel
from model.weights import save_model

ROOT = Path(__file__).resolve().parents[1]
_TOKENIZER_IDS = 384
_SECONDS = 600.0


class Served:
    """A folder of weights and, from the first batch on, a server of them; both end with this process."""

    def __init__(self, model: LanguageModel):
        self._folder = Path(tempfile.mkdtemp(prefix="served-"))
        self._closing = contextlib.ExitStack()
        atexit.register(self.close)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device.type, str(parameter.dtype).removeprefix("torch.")
        save_model(model, model.config, self._folder)
        (self._folder / "tokenizer").mkdir()
        (self._folder / "tokenizer" / "tokenizer.model").write_bytes(_tokenizer())
        self._slots = 0
        self._port = 0

    def close(self) -> None:
        """Stop the server and delete the weights."""
        self._closing.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def continued(self, prompts: Tensor, count: int) -> Tensor:
        """Have the server continue prompts [B, P] by `count` tokens each: [B, count], counted and not told."""
        if self._slots != len(prompts):
            self._start(len(prompts))
        with ThreadPoolExecutor(len(prompts)) as clients:
            found = list(clients.map(lambda prompt: self._ask(prompt.tolist(), count), prompts % _TOKENIZER_IDS))
        if set(found) != {count}:
            raise RuntimeError(f"answers have {sorted(set(found))} tokens, not {count}: a document ended early")
        return torch.zeros(len(prompts), count, dtype=torch.int64)

    def _start(self, slots: int) -> None:
        self._closing.close()
        settings = {
            "checkpoint": self._folder,
            "name": "served",
            "port": 0,
            "slots": slots,
            "max_prompt_tokens": 2**20,
            "max_new_tokens": 2**20,
            "max_body_bytes": 2**26,
            "stall_seconds": _SECONDS,
            "prefill_tokens": 16384,
            "device": self._device,
            "dtype": self._dtype,
        }
        command = [sys.executable, "-m", "model", "serve", *(f"{key}={value}" for key, value in settings.items())]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._closing.callback(server.wait)
        self._closing.callback(server.send_signal, signal.SIGTERM)
        assert server.stdout is not None
        announced = re.search(r":(\d+)$", server.stdout.readline().strip())
        if announced is None:
            raise RuntimeError(f"the server did not start (exit {server.wait()})")
        self._slots, self._port = slots, int(announced.group(1))

    def _ask(self, prompt: list[int], count: int) -> int:
        """The number of new tokens of an answer."""
        body = {"model": "served", "prompt": prompt, "max_tokens": count, "temperature": 0}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
        if "usage" not in answer:
            raise RuntimeError(f"the server refuses: {answer}")
        return int(answer["usage"]["completion_tokens"])


def _tokenizer() -> bytes:
    """A SentencePiece model of the project's own pages."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    return train_sentencepiece(pages, TokenizerConfig(vocab_size=_TOKENIZER_IDS))
