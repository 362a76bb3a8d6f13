"""The mLSTM of this package where `transformers` computes its own: one call, for a model that is loaded already.

    model = transformers.AutoModelForCausalLM.from_pretrained(...)   # an xLSTM
    use_in_transformers(model)

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kernels.mlstm import mlstm
from kernels.mlstm.state import MLSTMState
from kernels.precision import compute_dtype

# Where transformers has what is replaced; not imported here, as this package knows PyTorch alone.
_THEIR_MODULE, _THEIR_CLASS = "transformers.models.xlstm.modeling_xlstm", "xLSTMBackend"


class TransformersMLSTM(nn.Module):
    """In the place of transformers' xLSTMBackend: the same arguments, layout and results, computed by `mlstm`."""

    def __init__(self, config: Any, backend: str = "auto"):
        """`config`: transformers' xLSTMConfig, of which `mode`, `return_last_states` and `eps` are read; `backend`: as
        for `mlstm`."""
        super().__init__()
        self.config, self.backend = config, backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        igate: Tensor,
        fgate: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """
        Args:
            query, key: [B, NH, S, DK].
            value: [B, NH, S, DV].
            igate, fgate: [B, NH, S] pre-activations, after bias and soft cap.
            c_initial, n_initial, m_initial: [B, NH, DK, DV], [B, NH, DK] and [B, NH, 1], all or none of them.
            options: `return_last_states`, `mode`; None, or left out: the configuration's.

        Returns:
            h [B, NH, S, DV] in the dtype of `value`; where states are returned, which inference always does, also C, n
            and m after the last token, in float32, with the shapes of the initial ones.

        Raises:
            ValueError: one of the initial parts alone, an option or a mode that is unknown, or as `mlstm`.
        """
        returns_state = self._returns_state(**options)
        q, k, v, i, f = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
        h, state = mlstm(
            q,
            k,
            v,
            i,
            f,
            initial_state=_state(c_initial, n_initial, m_initial),
            return_state=returns_state,
            eps=self.config.eps,
            backend=self.backend,
        )
        if not returns_state:
            return h.transpose(1, 2)
        assert state is not None
        return h.transpose(1, 2), (state.C, state.n, state.m[..., None])

    def _returns_state(self, return_last_states: bool | None = None, mode: str | None = None) -> bool:
        mode = mode or self.config.mode
        if "inference" in mode:
            return True
        if "train" not in mode:
            raise ValueError(f"mode: no such mode ({mode}); choose train, train_with_padding or inference")
        return self.config.return_last_states if return_last_states is None else return_last_states

    def extra_repr(self) -> str:
        return f"backend={self.backend}"


def use_in_transformers(model: nn.Module, backend: str = "auto") -> int:
    """Let every mLSTM layer of a transformers xLSTM compute with `mlstm`; weights and all else stay as they are.

    What is computed is the same. Matrices are multiplied in the dtype of the model, whatever the configuration's
    `autocast_kernel_dtype` says, and prompts of any length are read without padding.

    Args:
        model: an xLSTM of transformers, or a module that contains one; it is changed where it lies.
        backend: as for `mlstm`; "auto" is Triton on a CUDA device and the reference elsewhere.

    Returns:
        The number of layers.

    Raises:
        ValueError: the model has no such layer: it is another one, or computes with the package xlstm, which
            transformers prefers where that is installed.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (type(child).__module__, type(child).__name__) == (_THEIR_MODULE, _THEIR_CLASS)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer of {_THEIR_MODULE}.{_THEIR_CLASS}: it is no xLSTM of transformers, "
            "or the package xlstm computes it"
        )
    for parent, name, child in found:
        setattr(parent, name, TransformersMLSTM(child.config, backend))
    return len(found)


def _state(c: Tensor | None, n: Tensor | None, m: Tensor | None) -> MLSTMState | None:
    given = [part for part in (c, n, m) if part is not None]
    if not given:
        return None
    if c is None or n is None or m is None:
        raise ValueError("c_initial, n_initial and m_initial are one state: give all three or none")
    # A cache of transformers has the model's dtype.
    dtype = compute_dtype(c, n, m)
    return MLSTMState(c.to(dtype), n.to(dtype), m[..., 0].to(dtype))
