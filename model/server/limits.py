"""How much the server takes on."""

from __future__ import annotations

from dataclasses import dataclass

from conf.problems import at_least, positive

# What OpenAI's interface allows of likeliest tokens beside each token.
MAX_LOGPROBS = 20
# Looked for behind every token.
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 128
# Log probabilities of one answer, which lie in memory until it is read: about 100 bytes each.
MAX_LOGPROB_ENTRIES = 2**18


@dataclass(frozen=True)
class Limits:
    """All of them together bound the memory that clients can take, whatever they do."""

    # Sequences that are continued at the same time.
    slots: int = 8
    # Sequences that wait for a slot; a request beyond is answered with 429.
    queue: int = 64
    # Of one prompt, the token that begins a text included.
    max_prompt_tokens: int = 32_768
    # Of one continuation.
    max_new_tokens: int = 4_096
    # Of the body of a request.
    max_body_bytes: int = 2**20
    # Requests that are being received, computed or sent; one beyond is answered with 429.
    connections: int = 512
    # A client that sends or takes nothing for so long is given up.
    stall_seconds: float = 30.0
    # After SIGTERM running answers may take so long to end.
    drain_seconds: float = 30.0

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        found = []
        for key in ("slots", "max_prompt_tokens", "max_new_tokens", "max_body_bytes", "connections"):
            found += at_least(key, getattr(self, key), 1)
        found += at_least("queue", self.queue, 0)
        found += positive("stall_seconds", self.stall_seconds)
        return found + at_least("drain_seconds", self.drain_seconds, 0)
