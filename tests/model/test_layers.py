"""Layers against their definitions, written out token by token or taken from transformers."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.mlstm import mlstm
from model.config import AttentionConfig, ModelConfig
from model.language_model import LanguageModel
from model.layers.attention import Attention, rotate
from model.layers.feed_forward import GatedGELU, SwiGLU
from model.projections import BlockDiagonalLinear


def test_llama_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        d_model=48,
        vocab_size=71,
        n_blocks=2,
        ffn_dim=80,
        norm_eps=1e-5,
        logit_soft_cap=None,
        block="attention",
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, rope_theta=10000.0),
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=48,
            vocab_size=71,
            num_hidden_layers=2,
            intermediate_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            attn_implementation="eager",
        )
    ).eval()
    renames = {
        "model.embed_tokens": "embedding",
        "model.layers": "blocks",
        "model.norm": "out_norm",
        "self_attn.o_proj": "mixer.out_proj",
        "self_attn": "mixer",
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp": "ffn",
    }
    weights = {}
    for name, weight in theirs.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        weights[name] = 4 * weight if weight.dim() == 2 else weight
    ours = LanguageModel(config)
    ours.load_state_dict(weights)
    for parameter in theirs.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    tokens = torch.randint(71, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_attention_against_its_definition(small_configs, make_model, make_batch):
    """Grouped heads and documents, one query at a time."""
    layer: Attention = make_model(small_configs["attention"]).blocks[0].mixer
    start = make_batch()["document_start"]
    x = torch.randn(2, 29, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x, start, None, False)
    for row in range(2):
        for query in range(29):
            first = max(position for position in range(query + 1) if start[row, position])
            inputs = x[row : row + 1, first : query + 1]
            position = torch.arange(inputs.shape[1])[None]
            q = rotate(layer.q_proj(inputs).unflatten(-1, (4, 8)), position, 500000.0)[0, -1]
            k = rotate(layer.k_proj(inputs).unflatten(-1, (2, 8)), position, 500000.0)[0]
            v = layer.v_proj(inputs).unflatten(-1, (2, 8))[0]
            heads = []
            for head in range(4):
                weights = torch.softmax(k[:, head // 2] @ q[head] / math.sqrt(8), dim=0)
                heads.append(weights @ v[:, head // 2])
            torch.testing.assert_close(y[row, query], layer.out_proj(torch.cat(heads)))


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = [
        (rotate(q, torch.tensor([[first + 7]]), 500000.0) * rotate(k, torch.tensor([[first]]), 500000.0)).sum().item()
        for first in (0, 3, 1000)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-9)
    assert torch.equal(rotate(q, torch.tensor([[0]]), 500000.0), q)


def test_rotary_angles_do_not_have_the_precision_of_the_activations():
    """In bfloat16 positions 8000 to 8015 would be one position."""
    x = torch.randn(1, 16, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    position = torch.arange(8000, 8016)[None]
    rotated = rotate(x, position, 500000.0)
    assert rotated.dtype == torch.bfloat16
    exact = rotate(x.double(), position, 500000.0)
    assert (rotated.double() - exact).norm() < 4e-3 * exact.norm()


def test_swiglu_and_gated_gelu():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    swiglu, geglu = SwiGLU(8, 12), GatedGELU(8, 12)
    for parameter in [*swiglu.parameters(), *geglu.parameters()]:
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    gate = x @ swiglu.gate_proj.weight.T
    hidden = gate / (1 + torch.exp(-gate)) * (x @ swiglu.up_proj.weight.T)
    torch.testing.assert_close(swiglu(x), hidden @ swiglu.down_proj.weight.T)
    gate, value = x @ geglu.up_proj.weight[:12].T, x @ geglu.up_proj.weight[12:].T
    hidden = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * value
    torch.testing.assert_close(geglu(x), hidden @ geglu.down_proj.weight.T)


def test_block_diagonal_linear_is_a_block_diagonal_matrix():
    layer = BlockDiagonalLinear(3, 4, 2)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight).T)


def per_head_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return h.flatten(-2) * weight


def conv_silu(x: torch.Tensor, conv) -> torch.Tensor:
    """One document, tap by tap; of no convolution only the SiLU."""
    if conv is None:
        return F.silu(x)
    padded = F.pad(x, (0, 0, 3, 0))
    taps = sum(padded[:, tap : tap + x.shape[1]] * conv.weight[:, 0, tap] for tap in range(4))
    return F.silu(taps + conv.bias)


def test_the_7b_mlstm_layer(small_configs, make_model):
    layer = make_model(small_configs["mlstm"]).blocks[0].mixer
    x = torch.randn(2, 29, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k = (x @ weight.T for weight in (layer.q_proj.weight, layer.k_proj.weight))
        assert q.shape[-1] == 16
        v = x @ layer.v_proj.weight.T
        igate, fgate = (15 * torch.tanh((x @ gate.weight.T + gate.bias) / 15) for gate in (layer.igate, layer.fgate))
        h, _ = mlstm(*(t.unflatten(-1, (2, -1)) for t in (q, k, v)), igate, fgate, eps=1e-6)
        gated = torch.sigmoid(x @ layer.output_gate.weight.T) * per_head_norm(h, layer.head_norm.weight, 1e-6)
        torch.testing.assert_close(layer(x, None, None, False)[0], gated @ layer.out_proj.weight.T)


@pytest.mark.parametrize("name", ["neurips_mlstm", "neurips_mlstm_and_slstm_without_convolutions"])
def test_the_neurips_mlstm_layer(small_configs, make_model, name):
    layer = make_model(small_configs[name]).blocks[0].mixer
    x = torch.randn(2, 29, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        u, z = x @ layer.up_proj.weight[:64].T, x @ layer.up_proj.weight[64:].T
        a = conv_silu(u, layer.conv)
        q, k = (a @ torch.block_diag(*weight).T for weight in (layer.q_proj.weight, layer.k_proj.weight))
        v = u @ torch.block_diag(*layer.v_proj.weight).T
        everything = torch.cat([q, k, v], dim=-1)
        igate, fgate = (everything @ gate.weight.T + gate.bias for gate in (layer.igate, layer.fgate))
        h, _ = mlstm(*(t.unflatten(-1, (2, -1)) for t in (q, k, v)), igate, fgate, eps=1e-6)
        mixed = per_head_norm(h, layer.head_norm.weight, 1e-5) + layer.learnable_skip * a
        torch.testing.assert_close(layer(x, None, None, False)[0], (mixed * F.silu(z)) @ layer.down_proj.weight.T)


@pytest.mark.parametrize(
    ("name", "cap"),
    [("slstm", 15.0), ("neurips_mlstm_and_slstm", None), ("neurips_mlstm_and_slstm_without_convolutions", None)],
)
def test_the_slstm_layer(small_configs, make_model, name, cap):
    """The recurrence of arXiv 2405.04517 §2.2 without its stabiliser, which double precision does not need here."""
    layer = make_model(small_configs[name]).blocks[1].mixer
    x = torch.randn(2, 29, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = x if layer.conv is None else conv_silu(x, layer.conv)
        h = c = n = torch.zeros(2, 2, 16, dtype=torch.float64)
        outputs = []
        for token in range(29):
            preact = {}
            for slot, (gate, source) in enumerate((("i", a), ("f", a), ("z", x), ("o", x))):
                weight = getattr(layer, f"{gate}gate_proj").weight
                mapped = torch.einsum("bhi,hoi->bho", source[:, token].unflatten(-1, (2, 16)), weight)
                recurrent = torch.einsum("bhi,hio->bho", h, layer.recurrent_kernel[:, :, slot])
                preact[gate] = mapped + recurrent + layer.bias[slot]
            if cap is not None:
                preact |= {gate: cap * torch.tanh(preact[gate] / cap) for gate in "if"}
            forget, write = torch.sigmoid(preact["f"]), torch.exp(preact["i"])
            c = forget * c + write * torch.tanh(preact["z"])
            n = forget * n + write
            h = torch.sigmoid(preact["o"]) * c / n
            outputs.append(h)
        expected = per_head_norm(torch.stack(outputs, dim=1), layer.head_norm.weight, 1e-5)
        torch.testing.assert_close(layer(x, None, None, False)[0], expected)


def test_residual_branches(small_configs, make_model):
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, has_ffn in (("mlstm", True), ("neurips_mlstm", False)):
        block = make_model(small_configs[name]).blocks[0]
        middle = x + block.mixer(block.mixer_norm(x), None, None, False)[0]
        expected = middle + block.ffn(block.ffn_norm(middle)) if has_ffn else middle
        assert (block.ffn is not None) == has_ffn
        assert torch.equal(block(x)[0], expected)
    rms = x.square().mean(-1, keepdim=True)
    norm = make_model(small_configs["mlstm"]).blocks[0].mixer_norm
    torch.testing.assert_close(norm(x), norm.weight * x / (rms + 1e-6).sqrt())
    norm = make_model(small_configs["neurips_mlstm"]).blocks[0].mixer_norm
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), norm.weight * centred / (variance + 1e-5).sqrt())
