"""The chunkwise mLSTM in Triton on the arguments of kernels.mlstm.inputs."""

from torch import Tensor

from kernels.mlstm.chunkwise.op import mlstm_chunkwise, mlstm_chunkwise_state, readable
from kernels.mlstm.inputs import CellInputs, CellSettings
from kernels.mlstm.state import MLSTMState


def mlstm_triton(
    q: Tensor,
    inputs: CellInputs,
    settings: CellSettings,
    *,
    return_state: bool = False,
    keep_chunk_states: bool = False,
) -> tuple[Tensor, MLSTMState | None]:
    """Result as kernels.mlstm.mlstm; q, k and v of one 16-bit or 32-bit dtype."""
    results = mlstm_chunkwise(readable(q), readable_inputs(inputs), settings, return_state, keep_chunk_states)
    return results.h, MLSTMState(results.C, results.n, results.m.detach()) if return_state else None


def mlstm_state_triton(inputs: CellInputs, settings: CellSettings) -> MLSTMState:
    """The state behind the last token; without an initial state, of the tokens alone. Dtypes as for mlstm_triton."""
    results = mlstm_chunkwise_state(readable_inputs(inputs), settings)
    return MLSTMState(results.C, results.n, results.m.detach())


def readable_inputs(inputs: CellInputs) -> CellInputs:
    """The inputs as the kernels can read them."""
    k, v, igate_preact, fgate_preact, *rest = inputs
    return CellInputs(readable(k), readable(v), igate_preact.contiguous(), fgate_preact.contiguous(), *rest)
