"""Runs the kernels of the chunkwise mLSTM in their order, forward and backward, on plain tensors.

Axes: B batch, S sequence, NH heads, DK query/key and DV value dimension, BH batch times heads, NC chunks, L tokens of
a chunk; SP = NC * L, the sequence padded to whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.mlstm.chunkwise.backward import key_gradient_kernel, query_gradient_kernel, value_gradient_kernel
from kernels.mlstm.chunkwise.gates import WEIGHT_ROWS, gate_gradients_kernel, weights_kernel
from kernels.mlstm.chunkwise.read_out import ROW_WEIGHT_ROWS, read_out_kernel, row_weights_kernel
from kernels.mlstm.chunkwise.scores import score_gradients_kernel, scores_kernel
from kernels.mlstm.chunkwise.states import states_kernel
from kernels.mlstm.chunkwise.tiles import Tile, Tiles, choose_tiles
from kernels.triton_support import INTERPRETED

# Tokens that the kernels of the gates take at a time; the interpreter goes through them one by one.
GATE_TOKENS = 256 if INTERPRETED else 2048


@dataclass(frozen=True)
class Problem:
    """Sizes and settings of one call. `eps` is added to the denominator."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    tiles: Tiles
    exponential: bool
    normaliser: bool
    eps: float

    @classmethod
    def of(cls, k: Tensor, v: Tensor, gate: str, normaliser: bool, eps: float) -> Problem:
        """The problem that k [B, S, NH, DK] and v [B, S, NH, DV] pose."""
        batch, length, heads, key_dim = k.shape
        value_dim = v.shape[-1]
        tiles = choose_tiles(k.dtype, key_dim, value_dim)
        return cls(batch, length, heads, key_dim, value_dim, tiles, gate == "exp", normaliser, eps)

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        return -(-self.length // self.tiles.chunk)

    @property
    def padded(self) -> int:
        return self.chunks * self.tiles.chunk

    @property
    def row_stride(self) -> int:
        """Elements of one row of packed weights."""
        return self.sequences * self.padded

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5

    def grid(self, tile: Tile, columns: int | None = None) -> tuple[int]:
        """Programs of a kernel with `tile.rows` tokens each, and `tile.columns` of so many columns."""
        column_tiles = 1 if columns is None else triton.cdiv(columns, tile.columns)
        return (column_tiles * (self.padded // tile.rows) * self.sequences,)


@dataclass(frozen=True)
class Documents:
    """Where documents begin: start [B, S] bool and number [B, S] int32; both None where nothing begins."""

    start: Tensor | None
    number: Tensor | None

    @classmethod
    def of(cls, document_start: Tensor | None) -> Documents:
        """From the public argument."""
        if document_start is None:
            return cls(None, None)
        return cls(document_start.contiguous(), document_start.cumsum(1, dtype=torch.int32))


def _strides(x: Tensor) -> tuple[int, int, int]:
    assert x.stride(3) == 1, "the head dimension must be contiguous"
    return x.stride(0), x.stride(1), x.stride(2)


def weights(
    problem: Problem, igate_preact: Tensor, fgate_preact: Tensor, documents: Documents, m_initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weights [5, BH, SP], decay of each chunk [BH, NC] and the last stabiliser [B, NH]; all float32."""
    options = {"dtype": torch.float32, "device": igate_preact.device}
    packed = torch.empty(WEIGHT_ROWS, problem.sequences, problem.padded, **options)
    chunk_decay = torch.empty(problem.sequences, problem.chunks, **options)
    m_final = torch.empty(problem.batch, problem.heads, **options)
    chunk = problem.tiles.chunk
    weights_kernel[(problem.sequences,)](
        igate_preact,
        fgate_preact,
        documents.start,
        m_initial,
        packed,
        chunk_decay,
        m_final,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        HAS_STARTS=documents.start is not None,
        HAS_INITIAL=m_initial is not None,
        EXPONENTIAL=problem.exponential,
        L=chunk,
        CB=max(1, GATE_TOKENS // chunk),
        num_warps=8,
    )
    return packed, chunk_decay, m_final


@dataclass
class States:
    """What the recurrence between chunks leaves: before each chunk (in its direction), and behind the last.

    matrices [BH, NC, DK, DV] in the inputs' precision, vectors [BH, NC, DK] float32, matrix [B, NH, DK, DV] and
    vector [B, NH, DK] float32; None where not asked for.
    """

    matrices: Tensor | None
    vectors: Tensor | None
    matrix: Tensor | None
    vector: Tensor | None


def states(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    matrix_weight: Tensor,
    vector_weight: Tensor,
    chunk_decay: Tensor,
    before: tuple[Tensor | None, Tensor | None],
    *,
    backwards: bool = False,
    store_chunks: bool = True,
    store_after: bool = False,
) -> States:
    """Run the recurrence over x [B, S, NH, DK] and y [B, S, NH, DV], weighted by [BH, SP], from the state `before`."""
    tile = problem.tiles.states
    sequences, chunks, key_dim, value_dim = problem.sequences, problem.chunks, problem.key_dim, problem.value_dim
    result = States(None, None, None, None)
    if store_chunks:
        result.matrices = x.new_empty(sequences, chunks, key_dim, value_dim)
        result.vectors = x.new_empty(sequences, chunks, key_dim, dtype=torch.float32)
    if store_after:
        result.matrix = x.new_empty(problem.batch, problem.heads, key_dim, value_dim, dtype=torch.float32)
        result.vector = x.new_zeros(problem.batch, problem.heads, key_dim, dtype=torch.float32)
    grid = (triton.cdiv(key_dim, tile.rows) * triton.cdiv(value_dim, tile.columns) * sequences,)
    states_kernel[grid](
        x,
        y,
        matrix_weight,
        vector_weight,
        chunk_decay,
        *before,
        result.matrices,
        result.vectors,
        result.matrix,
        result.vector,
        problem.length,
        problem.heads,
        chunks,
        *_strides(x),
        *_strides(y),
        DX=key_dim,
        DY=value_dim,
        L=problem.tiles.chunk,
        BX=tile.rows,
        BY=tile.columns,
        BT=tile.tokens,
        BACKWARDS=backwards,
        VECTOR=problem.normaliser,
        HAS_BEFORE=before[0] is not None,
        STORE_CHUNKS=store_chunks,
        STORE_AFTER=store_after,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result


def scores(
    problem: Problem, q: Tensor, k: Tensor, packed: Tensor, vectors: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    """What each token reads of each other one of its chunk [BH, SP, L], and n^T q / sqrt(DK) [BH, SP] float32."""
    tiles, tile = problem.tiles, problem.tiles.scores
    scores = q.new_empty(problem.sequences, problem.padded, tiles.chunk)
    query_normaliser = q.new_empty(problem.sequences, problem.padded, dtype=torch.float32)
    scores_kernel[problem.grid(tile)](
        q,
        k,
        packed,
        vectors,
        documents.number,
        scores,
        query_normaliser,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *_strides(q),
        *_strides(k),
        SCALE=problem.scale,
        DK=problem.key_dim,
        L=tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BD=tile.inner,
        NORMALISER=problem.normaliser,
        HAS_STARTS=documents.number is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return scores, query_normaliser


def read_out(
    problem: Problem,
    q: Tensor,
    v: Tensor,
    packed: Tensor,
    query_normaliser: Tensor,
    matrices: Tensor,
    scores: Tensor,
) -> Tensor:
    """h [B, S, NH, DV] in v's dtype."""
    h = v.new_empty(v.shape)
    tile = problem.tiles.read_out
    read_out_kernel[problem.grid(tile, problem.value_dim)](
        q,
        v,
        packed,
        query_normaliser,
        matrices,
        scores,
        h,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        problem.eps,
        *_strides(q),
        *_strides(v),
        SCALE=problem.scale,
        DK=problem.key_dim,
        DV=problem.value_dim,
        L=problem.tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.inner,
        BT=tile.tokens,
        NORMALISER=problem.normaliser,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return h


def row_weights(problem: Problem, h: Tensor, grad_h: Tensor, packed: Tensor, query_normaliser: Tensor) -> Tensor:
    """[4, BH, SP] float32: the names of kernels.mlstm.chunkwise.read_out."""
    result = packed.new_empty(ROW_WEIGHT_ROWS, problem.sequences, problem.padded)
    rows = min(64, problem.tiles.chunk)
    row_weights_kernel[(problem.padded // rows * problem.sequences,)](
        h,
        grad_h,
        packed,
        query_normaliser,
        result,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        problem.eps,
        *_strides(h),
        *_strides(grad_h),
        SCALE=problem.scale,
        DV=problem.value_dim,
        L=problem.tiles.chunk,
        BM=rows,
        BD=min(128, triton.next_power_of_2(problem.value_dim)),
        NORMALISER=problem.normaliser,
        num_warps=4,
    )
    return result


def score_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_h: Tensor,
    packed: Tensor,
    rows: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores divided by the denominator and the gradients of q k^T, both [BH, SP, L]; and sums of the gradients of
    the log weights [2 + L / tile rows, BH, SP], see the kernel.
    """
    tiles, tile = problem.tiles, problem.tiles.score_gradients
    scores = q.new_empty(problem.sequences, problem.padded, tiles.chunk)
    grad_scores = torch.empty_like(scores)
    weight_sums = packed.new_empty(2 + tiles.chunk // tile.rows, problem.sequences, problem.padded)
    score_gradients_kernel[problem.grid(tile)](
        q,
        k,
        v,
        grad_h,
        packed,
        rows,
        documents.number,
        scores,
        grad_scores,
        weight_sums,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *_strides(grad_h),
        SCALE=problem.scale,
        DK=problem.key_dim,
        DV=problem.value_dim,
        L=tiles.chunk,
        BM=tile.rows,
        BN=tile.columns,
        BD=tile.inner,
        HAS_STARTS=documents.number is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return scores, grad_scores, weight_sums


def query_gradient(
    problem: Problem, q: Tensor, k: Tensor, grad_h: Tensor, rows: Tensor, before: States, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_q [B, S, NH, DK], and by tile of columns q . (the memory's part of grad_q) [tiles, BH, SP] float32."""
    tile = problem.tiles.query_gradient
    grad_q = q.new_empty(q.shape)
    products = rows.new_empty(triton.cdiv(problem.key_dim, tile.columns), problem.sequences, problem.padded)
    query_gradient_kernel[problem.grid(tile, problem.key_dim)](
        q,
        k,
        grad_h,
        rows,
        before.matrices,
        before.vectors,
        grad_scores,
        grad_q,
        products,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *_strides(q),
        *_strides(k),
        *_strides(grad_h),
        NORMALISER=problem.normaliser,
        **_block_sizes(problem, tile),
    )
    return grad_q, products


def key_gradient(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, packed: Tensor, behind: States, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_k [B, S, NH, DK], and by tile of columns k . (the memory's part of grad_k) [tiles, BH, SP] float32."""
    tile = problem.tiles.key_gradient
    grad_k = k.new_empty(k.shape)
    products = packed.new_empty(triton.cdiv(problem.key_dim, tile.columns), problem.sequences, problem.padded)
    key_gradient_kernel[problem.grid(tile, problem.key_dim)](
        q,
        k,
        v,
        packed,
        behind.matrices,
        behind.vectors,
        grad_scores,
        grad_k,
        products,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        NORMALISER=problem.normaliser,
        **_block_sizes(problem, tile),
    )
    return grad_k, products


def value_gradient(
    problem: Problem, k: Tensor, grad_h: Tensor, packed: Tensor, behind: States, scores: Tensor
) -> Tensor:
    """grad_v [B, S, NH, DV]."""
    tile = problem.tiles.value_gradient
    grad_v = k.new_empty(problem.batch, problem.length, problem.heads, problem.value_dim)
    value_gradient_kernel[problem.grid(tile, problem.value_dim)](
        k,
        grad_h,
        packed,
        behind.matrices,
        scores,
        grad_v,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        *_strides(k),
        *_strides(grad_h),
        **_block_sizes(problem, tile),
    )
    return grad_v


def gate_gradients(
    problem: Problem,
    weight_sums: Tensor,
    query_products: Tensor,
    key_products: Tensor,
    chunk_decay: Tensor,
    final_products: Tensor | None,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    documents: Documents,
    has_initial: bool,
    negligible_decay: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of igate_preact and fgate_preact [B, S, NH], float32.

    negligible_decay: below it, nothing is said to pass a whole chunk; that of the precision of the states.
    """
    grads = [torch.empty_like(gate, dtype=torch.float32) for gate in (igate_preact, fgate_preact)]
    chunk = problem.tiles.chunk
    gate_gradients_kernel[(problem.sequences,)](
        weight_sums,
        query_products,
        key_products,
        chunk_decay,
        final_products,
        igate_preact,
        fgate_preact,
        documents.start,
        *grads,
        problem.length,
        problem.heads,
        problem.chunks,
        problem.row_stride,
        negligible_decay,
        SUM_PARTS=len(weight_sums) - 2,
        QUERY_PARTS=len(query_products),
        KEY_PARTS=len(key_products),
        HAS_STARTS=documents.start is not None,
        HAS_INITIAL=has_initial,
        HAS_FINAL=final_products is not None,
        EXPONENTIAL=problem.exponential,
        L=chunk,
        CB=max(1, GATE_TOKENS // chunk),
        num_warps=8,
    )
    return grads[0], grads[1]


def _block_sizes(problem: Problem, tile: Tile) -> dict[str, int]:
    """The constants of the three gradient kernels."""
    return {
        "DK": problem.key_dim,
        "DV": problem.value_dim,
        "L": problem.tiles.chunk,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.inner,
        "BT": tile.tokens,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
