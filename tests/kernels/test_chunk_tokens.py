"""How long a chunk of the Triton kernels will be is known without a GPU and without Triton."""

import subprocess
import sys

import pytest
import torch

from kernels.mlstm.chunkwise import tiles
from tests.runs import PATIENCE, ROOT


def test_is_the_chunk_of_the_table_in_any_batch():
    for path in tiles.TABLES.glob("*.json"):
        device = path.stem.replace("_", " ")
        for (key_dim, value_dim, _), cut in tiles.tuned(device).items():
            assert tiles.chunk_tokens(key_dim, value_dim, torch.bfloat16, device) == cut.chunk


@pytest.mark.parametrize(
    ("dtype", "device", "chunk"),
    [(torch.float32, "NVIDIA H200", 64), (torch.bfloat16, "a GPU of tomorrow", 128), (torch.float16, "", 128)],
    ids=str,
)
def test_what_was_not_tuned(dtype, device, chunk):
    assert tiles.chunk_tokens(24, 40, dtype, device) == chunk


def test_needs_no_triton():
    code = (
        "import sys\nsys.modules['triton'] = None\nimport torch\n"
        "from kernels.mlstm import accounting\nfrom kernels.slstm import accounting\n"
        "from kernels.mlstm.chunkwise.tiles import chunk_tokens\nprint(chunk_tokens(256, 512, torch.bfloat16, ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "128", done.stderr
