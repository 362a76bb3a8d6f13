"""What the kernel benchmark runs: shapes, inputs, and the least time that each shape can take.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head, DH dimension of an sLSTM head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MLSTMCase:
    """One mLSTM problem: B sequences of S tokens, NH heads of DK/DV."""

    name: str
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    kind: str = "mlstm"

    @property
    def title(self) -> str:
        """For tables: heads, head dims, length and batch."""
        return f"mLSTM {self.heads} x {self.key_dim}/{self.value_dim}, S={self.length}, B={self.batch}"

    def inputs(self, seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random q, k, v and upstream gradient dh in `dtype` and float32 gate pre-activations as at initialisation.

        Returns:
            q, k [B, S, NH, DK], v, dh [B, S, NH, DV], igate_preact (near -10) and fgate_preact (3 to 6 over the
            heads) [B, S, NH].
        """
        generator = torch.Generator(device).manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        tokens = (self.batch, self.length, self.heads)
        forget_bias = torch.linspace(3, 6, self.heads, device=device)
        return {
            "q": noise(*tokens, self.key_dim).to(dtype),
            "k": noise(*tokens, self.key_dim).to(dtype),
            "v": noise(*tokens, self.value_dim).to(dtype),
            "igate_preact": noise(*tokens) - 10,
            "fgate_preact": noise(*tokens) + forget_bias,
            "dh": noise(*tokens, self.value_dim).to(dtype),
        }

    def floors(self, bytes_per_second: float, flops_per_second: float, chunk: int) -> dict[str, float]:
        """Least milliseconds of a two-pass chunkwise kernel with bf16 activations and bf16 chunk states.

        The larger of the matrix products (half of each chunk's score block) over the matrix rate, and of the bytes
        (inputs, outputs, gate vectors, chunk states written and read once per pass) over the copy rate.
        """
        tokens = self.batch * self.heads * self.length
        dk, dv = self.key_dim, self.value_dim
        flops = 4 * dk * dv + chunk * (dk + dv)
        state_bytes = 2 * dk * dv * 2 / chunk
        moved = 6 * (dk + dv) + state_bytes + 32
        backward_flops = 10 * dk * dv + chunk * (3 * dk + 2 * dv)
        backward_moved = 8 * (dk + dv) + 4 * dk + 2 * dv + 2 * state_bytes + 48
        forward = max(flops / flops_per_second, moved / bytes_per_second)
        backward = max(backward_flops / flops_per_second, backward_moved / bytes_per_second)
        return {"forward": 1e3 * tokens * forward, "both": 1e3 * tokens * (forward + backward)}


@dataclass(frozen=True)
class SLSTMCase:
    """One sLSTM problem: B sequences of S tokens, NH heads of DH."""

    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    kind: str = "slstm"

    @property
    def title(self) -> str:
        """For tables: heads, head dim, length and batch."""
        return f"sLSTM {self.heads} x {self.head_dim}, S={self.length}, B={self.batch}"

    def inputs(self, seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """gates_x [B, S, 4, NH, DH] (f around 3 to 6), recurrent_kernel [NH, DH, 4, DH] and dh [B, S, NH, DH]."""
        generator = torch.Generator(device).manual_seed(seed)
        heads, width = self.heads, self.head_dim

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        gates = noise(self.batch, self.length, 4, heads, width)
        gates[:, :, 1] += torch.linspace(3, 6, width, device=device)
        return {
            "gates_x": gates.to(dtype),
            "recurrent_kernel": (noise(heads, width, 4, width) / (2 * math.sqrt(width))).to(dtype),
            "dh": noise(self.batch, self.length, heads, width).to(dtype),
        }


Case = MLSTMCase | SLSTMCase

# In the order in which they run, what matters most first.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        MLSTMCase("mlstm_8x256_512_b8", 8, 8192, 8, 256, 512),
        MLSTMCase("mlstm_8x256_512_b1", 1, 8192, 8, 256, 512),
        SLSTMCase("slstm_4x256", 64, 2048, 4, 256),
        SLSTMCase("slstm_4x512", 64, 2048, 4, 512),
        MLSTMCase("mlstm_4x256_512", 8, 2048, 4, 256, 512),
        MLSTMCase("mlstm_16x128_256", 8, 8192, 16, 128, 256),
        MLSTMCase("mlstm_16x128_256_short", 32, 2048, 16, 128, 256),
        # For a CPU: they test the harness, and say nothing about speed.
        MLSTMCase("tiny_mlstm", 2, 48, 2, 8, 16),
        SLSTMCase("tiny_slstm", 2, 24, 2, 16),
    )
}


def select(names: str) -> list[Case]:
    """Cases by comma-separated names; "mlstm", "slstm" and "all" stand for every case that is not tiny.

    Raises:
        ValueError: an unknown name.
    """
    chosen: dict[str, Case] = {}
    for name in names.split(","):
        group = [c for c in CASES.values() if not c.name.startswith("tiny") and name in ("all", c.kind)]
        if not group and name not in CASES:
            raise ValueError(f"--cases: unknown case {name!r}; use all, mlstm, slstm or of {', '.join(CASES)}")
        chosen.update({case.name: case for case in group or [CASES[name]]})
    return list(chosen.values())
