"""Decoding on buffers that stay where they are: a step is one pass over rows, each with the state of one sequence.

On a GPU a step is a CUDA graph, captured once for each number of rows that take part and played from then on: the host
launches one graph in the place of every kernel. On a CPU the same function is called as it is.

Axes: R rows of a session, B rows that take part in a step, K sequences, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from model.accounting import state_elements
from model.generation.fused_step import step_of
from model.language_model import LanguageModel
from model.state import ModelState, named_tensors

# Tokens that caches of attention have memory for at least.
_LEAST_ROOM = 128
# Devices that compute a step by themselves, while the host waits for the tokens of the one before.
RUNNING_AHEAD = ("cuda",)
# Devices on which steps are played from CUDA graphs.
PLAYING_GRAPHS = ("cuda",)
# Steps on a side stream before a capture: what is compiled, tuned or allocated at the first call then is.
_WARM_UP_STEPS = 2


class Session:
    """A model and the states of up to R sequences, row by row in buffers that every step updates in place.

    A row is given a sequence by `put`. A step takes the tokens that lie in `tokens` and leaves the logits behind them
    in `logits`. One thread uses a session; its tensors live on the model's device, and are written in
    torch.inference_mode alone.

    Attributes:
        tokens: [R] int64, the next token of each row.
        logits: [R, V] float32 (float64 for a float64 model), behind the last token of each row.
        room: tokens that caches of attention have memory for.
        runs_ahead: a step should be launched before the host reads what the last one gave.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        *,
        batch_sizes: Sequence[int] | None = None,
        like: tuple[Tensor, ModelState] | None = None,
        tokens: int = 1,
    ):
        """
        Args:
            model: nothing changes its weights or moves them while the session is used.
            rows: R.
            batch_sizes: the numbers of rows that a step may have, R among them; None: R and the powers of two below it.
                A step has the smallest of them that suffices. With R alone all steps have one shape, so that rounding
                too is the same whatever other rows hold.
            like: logits and the state that `model` gave with them, whose form the rows take; None: it computes a
                token for that.
            tokens: how many caches have room for at first.
        """
        self.model = model
        self._advance_model = step_of(model)
        self.rows = rows
        self._batch_sizes = sorted(batch_sizes or {rows, *(2**power for power in range((rows - 1).bit_length()))})
        assert self._batch_sizes[-1] == rows, f"the largest of {self._batch_sizes} is not {rows}"
        self.device = next(model.parameters()).device
        self.runs_ahead = self.device.type in RUNNING_AHEAD
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._has_caches = state_elements(model.config)["cache_per_token"] > 0
        self.room = _room_for(tokens)
        logits, state = like or model.predict(self.tokens[:1, None])
        self._state, self.logits = self._empty_buffers(state.map(lambda tensor: tensor[:1]), logits)
        self._views: dict[int, tuple[ModelState, list[Tensor]]] = {}
        self._player: _GraphPlayer | None = _GraphPlayer(self) if self.device.type in PLAYING_GRAPHS else None

    def _empty_buffers(self, state: ModelState, logits: Tensor) -> tuple[ModelState, Tensor]:
        """State and logits of R rows that hold nothing, in the form of those of one sequence."""
        return (
            state.for_decoding(self.room).map(lambda tensor: tensor.new_zeros(self.rows, *tensor.shape[1:])),
            logits.new_zeros(self.rows, logits.shape[1]),
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of one row's state, with the room that it has now."""
        return sum(tensor.nbytes for _, tensor in named_tensors(self._state)) // self.rows

    @torch.inference_mode()
    def put(self, row: int, state: ModelState, logits: Tensor) -> None:
        """Give the K rows from `row` on the states of K sequences and the logits [K, V] behind them: a copy.

        `fit` has made room for the longest of them.
        """
        rows = slice(row, row + logits.shape[0])
        for (_, mine), (_, other) in zip(
            named_tensors(self._state), named_tensors(state.for_decoding(self.room)), strict=True
        ):
            mine[rows].copy_(other)
        self.logits[rows].copy_(logits)

    @torch.inference_mode()
    def take(self, row: int) -> ModelState:
        """A copy of one row's state, as a batch of one."""
        return self._state.map(lambda tensor: tensor[row : row + 1].clone())

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let the sequence of row `source` go on in row `target`."""
        for buffer in (self.tokens, self.logits, *(tensor for _, tensor in named_tensors(self._state))):
            buffer[target].copy_(buffer[source])

    @torch.inference_mode()
    def fit(self, tokens: int) -> None:
        """Have room for sequences of so many tokens, prompt included, and not much more; without caches nothing to do.

        Buffers that change their size are new ones, and what was captured on the old ones is captured again.
        """
        if self.room // 8 < tokens <= self.room or tokens <= _LEAST_ROOM == self.room:
            return
        if self._has_caches:
            self._state = self._state.for_decoding(room := _room_for(tokens))
            self.room = room
            self._views.clear()
            if self._player is not None:
                self._player.forget()

    @torch.inference_mode()
    def step(self, rows: int) -> None:
        """Run the model over `tokens` of the first rows, at least `rows` of them: their states and logits move on."""
        size = next(size for size in self._batch_sizes if size >= rows)
        if self._player is None or not self._player.play(size):
            self.advance(size)

    def advance(self, size: int) -> None:
        """What a step launches."""
        state, mine = self._first_rows(size)
        logits, new = self._advance_model(self.tokens[:size], state)
        self.logits[:size].copy_(logits)
        for (name, tensor), old in zip(named_tensors(new), mine, strict=True):
            # Layers whose states are made for decoding have updated them where they lie.
            if tensor is not old:
                if tensor.shape != old.shape:
                    raise ValueError(
                        f"the state {name} went from {tuple(old.shape)} to {tuple(tensor.shape)} in one step; a kind "
                        "of layer whose state grows has to register how it lies in memory of a fixed size "
                        "(model.state.for_decoding)"
                    )
                old.copy_(tensor)

    def _first_rows(self, size: int) -> tuple[ModelState, list[Tensor]]:
        """The states of the first rows, in the same memory, and their tensors."""
        if size not in self._views:
            state = self._state.map(lambda tensor: tensor[:size])
            self._views[size] = state, [tensor for _, tensor in named_tensors(state)]
        return self._views[size]

    def rows_of_state(self, size: int) -> ModelState:
        """The states of the first rows, in the same memory."""
        return self._first_rows(size)[0]


def _room_for(tokens: int) -> int:
    """Tokens that caches have memory for where sequences have so many: few sizes, so that little is captured anew."""
    return max(_LEAST_ROOM, 2 ** (tokens - 1).bit_length())


class _GraphPlayer:
    """The steps of a session as CUDA graphs, one for each number of rows, captured when it is first asked for."""

    def __init__(self, session: Session):
        self._session = session
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Graphs play one after the other and hand nothing on but by the session's buffers: they share their memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._captures = True

    def forget(self) -> None:
        """The buffers are others now."""
        # None of them may be playing.
        torch.cuda.synchronize(self._session.device)
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def play(self, size: int) -> bool:
        """Play a step of `size` rows; False: this model cannot be captured, nothing has been done."""
        if self._captures and size not in self._graphs:
            self._graphs[size] = self._capture(size)
        if not self._captures:
            return False
        self._graphs[size].replay()
        return True

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        session = self._session
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(session.device):
            # The steps before the capture are real ones.
            kept, logits = session.rows_of_state(size).map(torch.clone), session.logits[:size].clone()
            side = torch.cuda.Stream(session.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_STEPS):
                    session.advance(size)
            torch.cuda.current_stream().wait_stream(side)
            try:
                # A server's other threads may call CUDA meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    session.advance(size)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._captures = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"decoding goes without CUDA graphs, more slowly: {reason}", stacklevel=2)
            for (_, mine), (_, other) in zip(
                named_tensors(session.rows_of_state(size)), named_tensors(kept), strict=True
            ):
                mine.copy_(other)
            session.logits[:size].copy_(logits)
        return graph
