"""How the cooperating programs of a team hand each other numbers: each number says itself which turn it belongs to.

A head's recurrent weights do not fit one multiprocessor, so a team of programs shares them and exchanges numbers at
each token, through the L2 cache. A separate flag would cost two more round trips to it (data, fence, flag; flag, data).
Instead one bit of each number is the turn's, and each thread reads what it needs again and again until all of it is of
the turn: no barrier, no reduction. Two slots alternate, so that they stay in the cache; who has the numbers of a turn
from all members knows that all have read those of the turn before, and may overwrite them.

bfloat16 numbers are sent scaled by 2^-64, and so lie in (-2, 2), where the highest bit of the exponent is free; what
exceeds 2^65, or is no number, arrives as 2^65, and what is below 2^-62 as little as 2^-69 off. Others are sent as
float32, whose lowest bit is the turn's.

All programs must be resident together (cooperative launch). A wait is bounded: results become NaN if it fails.

Under Triton's interpreter programs run one after the other, so that no wait is of use: a number is there or is NaN.
"""

import triton
import triton.language as tl

from kernels.triton_support import INTERPRETED

ONE_BY_ONE = tl.constexpr(INTERPRETED)
# Clock cycles after which a program no longer waits, from when it began with its sequences; about 10 seconds.
PATIENCE = tl.constexpr(1 << 34)
_SCALE = tl.constexpr(2.0**-64)
_LARGEST = tl.constexpr(1.9921875)


@triton.constexpr_function
def sent_dtype(dtype):
    """The integer type whose bits a number travels as."""
    return tl.int16 if dtype == tl.bfloat16 else tl.int32


@triton.constexpr_function
def unscale(dtype):
    """Factor from numbers as they arrive to numbers as they were."""
    return 2.0**64 if dtype == tl.bfloat16 else 1.0


@triton.constexpr_function
def _await_asm(words, pack, keep):
    """PTX that loads `pack` vectors of `words` words until each word has the turn's bit; operands as in await_words."""
    outputs = words * pack
    turn, tag, deadline = (outputs + (1 + k) * pack for k in range(3))
    lines = [".reg .pred missing, patient;", ".reg .b32 wrong, one, poison;", ".reg .b64 now;", "again:"]
    vector = f".v{words}" if words > 1 else ""
    for k in range(pack):
        names = ", ".join(f"${word * pack + k}" for word in range(words))
        target = f"{{{names}}}" if words > 1 else names
        lines.append(f"ld.relaxed.gpu.global{vector}.b32 {target}, [${outputs + k}];")
    lines.append("mov.b32 wrong, 0;")
    for k in range(outputs):
        lines += [f"xor.b32 one, ${k}, ${turn};", "or.b32 wrong, wrong, one;"]
    lines += [
        f"and.b32 wrong, wrong, ${tag};",
        "setp.ne.b32 missing, wrong, 0;",
        "mov.u64 now, %clock64;",
        f"setp.lt.and.s64 patient, now, ${deadline}, missing;",
        "@patient bra again;",
        "selp.b32 poison, 0x7FFF7FFF, 0, missing;",
    ]
    for k in range(outputs):
        lines += [f"and.b32 ${k}, ${k}, {keep};", f"or.b32 ${k}, ${k}, poison;"]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _await_constraints(words, pack):
    return ",".join(["=&r"] * (words * pack) + ["l"] * pack + ["r"] * 2 * pack + ["l"] * pack)


@triton.constexpr_function
def _words_dtype(words):
    return (tl.int32,) * words


@triton.jit
def patience():
    """The clock's value after which await_words gives up."""
    if ONE_BY_ONE:
        deadline = 0
    else:
        now = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        deadline = now + PATIENCE
    return deadline


@triton.jit
def as_loaded(pointers, base, unaligned):
    """The int32 `pointers` [M, N], for await_words, before a loop; `base` is any int32 pointer, `unaligned` may be odd.

    The compiler lays tensors out as its own loads need them, and leaves all else as it comes, to be moved through
    shared memory at each join. So there is one, of nothing: no pointer is null. It looks like one of neighbours along
    N, one for each thread.
    """
    M: tl.constexpr = pointers.shape[0]
    N: tl.constexpr = pointers.shape[1]
    neighbours = base + unaligned + (tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    return pointers + tl.load(neighbours, pointers.to(tl.int64) == 0, other=0)


@triton.jit
def _there_or_nan(pointers, turn, tag, TAG: tl.constexpr):
    """What await_words makes of int32 words at the end of its patience."""
    words = tl.load(pointers)
    return (words & (-1 - TAG)) | tl.where((words ^ turn) & tag != 0, 0x7FFF7FFF, 0)


@triton.jit
def await_words(pointers, phase, waits, deadline, dtype: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr):
    """WORDS (1, 2 or 4) int32 words from each of the int32 `pointers` [M, N], as [M, N * WORDS].

    Returns when all words a thread reads have the turn's `phase` (0 or 1), at once unless `waits`. The bits of the
    phase read as 0.
    """
    TAG: tl.constexpr = 0x40004000 if dtype == tl.bfloat16 else 1
    KEEP: tl.constexpr = 0xBFFFBFFF if dtype == tl.bfloat16 else 0xFFFFFFFE
    M: tl.constexpr = pointers.shape[0]
    N: tl.constexpr = pointers.shape[1]
    EACH: tl.constexpr = M * N // (32 * WARPS)
    PACK: tl.constexpr = EACH if EACH > 0 else 1
    if ONE_BY_ONE:
        words = ()
        for word in tl.static_range(WORDS):
            words += (_there_or_nan(pointers + word, phase * TAG, tl.where(waits, TAG, 0), TAG),)
    else:
        words = tl.inline_asm_elementwise(
            _await_asm(WORDS, PACK, KEEP),
            _await_constraints(WORDS, PACK),
            [pointers, phase * TAG, tl.where(waits, TAG, 0), deadline],
            dtype=_words_dtype(WORDS),
            is_pure=False,
            pack=PACK,
        )
    if WORDS == 4:
        result = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3])).reshape(M, N * 4)
    elif WORDS == 2:
        result = tl.join(words[0], words[1]).reshape(M, N * 2)
    else:
        result = words[0]
    return result


@triton.jit
def halves(words):
    """The two bfloat16 numbers of each int32 word, the first the lower half, as float32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def to_send(values, phase, dtype: tl.constexpr):
    """Bits of float32 `values`, rounded to `dtype`, with the turn's `phase` (0 or 1)."""
    if dtype == tl.bfloat16:
        # A minimum or maximum with something that is no number is the other.
        scaled = tl.minimum(tl.maximum(values * _SCALE, -_LARGEST), _LARGEST)
        bits = (scaled.to(tl.bfloat16).to(tl.int16, bitcast=True) | (phase << 14).to(tl.int16)).to(tl.int16)
    else:
        bits = (values.to(dtype).to(tl.float32).to(tl.int32, bitcast=True) & -2) | phase
    return bits


@triton.jit
def product(a, b):
    """a @ b, added in float32; float32 factors keep their precision on tensor cores (as three TF32 products)."""
    return tl.dot(a, b, input_precision="tf32x3")
