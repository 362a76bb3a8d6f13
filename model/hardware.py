"""Where a model computes and in which precision, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU = "CPU"


@dataclass(frozen=True)
class Hardware:
    """The default is the specification: reference backends, matrix products in bfloat16.

    Attributes:
        device_name: a GPU as torch.cuda.get_device_name says it, where the backend "auto" means kernels; or "CPU".
        compute_bytes: of one activation: 2 for bfloat16, 4 for float32.
        compiles: blocks run compiled (model/compilation.py), and keep less for the backward pass.
    """

    device_name: str = CPU
    compute_bytes: int = 2
    compiles: bool = False

    def runs_kernels(self, backend: str) -> bool:
        """Whether a layer with this `backend` (kernels.backend_choice.BACKENDS) computes with kernels here."""
        return backend == "triton" or (backend == "auto" and self.device_name != CPU)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations that enter matrix products."""
        return torch.bfloat16 if self.compute_bytes < 4 else torch.float32
