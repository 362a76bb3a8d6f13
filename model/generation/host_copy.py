"""What a GPU has drawn, on its way to the host. Axes: B rows that drew."""

from __future__ import annotations

import torch
from torch import Tensor

from model.generation.sampling import Drawn


class HostCopy:
    """Begins to copy what was drawn. Only reading it waits, and for nothing that is launched after this."""

    def __init__(self, drawn: Drawn):
        on_gpu = drawn.tokens.device.type == "cuda"

        def copied(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            # Memory of the host that a GPU writes to by itself is pinned.
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=on_gpu).copy_(part, non_blocking=True)

        self._tokens = copied(drawn.tokens)
        self._logprobs = copied(drawn.logprobs)
        self._top_tokens, self._top_logprobs = copied(drawn.top_tokens), copied(drawn.top_logprobs)
        self._done: torch.cuda.Event | None = None
        if on_gpu:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(drawn.tokens.device))

    def tokens(self) -> Tensor:
        """[B] int64 on the CPU."""
        self._wait()
        assert self._tokens is not None
        return self._tokens

    def logprobs(self, row: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The log probability of the token of `row`, and the `count` most likely tokens with theirs, best first."""
        self._wait()
        assert self._logprobs is not None and self._top_tokens is not None and self._top_logprobs is not None
        likely = zip(self._top_tokens[row, :count].tolist(), self._top_logprobs[row, :count].tolist(), strict=True)
        return float(self._logprobs[row]), tuple(likely)

    def _wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()
            self._done = None
