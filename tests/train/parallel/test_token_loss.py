"""What the engine hands to DeepSpeed."""

import torch

from model.config import MLSTMConfig, ModelConfig
from model.initialisation import initialise
from model.language_model import LanguageModel
from train.parallel.token_loss import TokenLossSum


def test_the_z_loss_is_trained_on_and_not_evaluated():
    config = ModelConfig(d_model=32, vocab_size=61, n_blocks=1, ffn_dim=48, mlstm=MLSTMConfig(n_heads=2))
    model = LanguageModel(config)
    initialise(model, seed=1)
    tokens = torch.arange(12).view(2, 6)
    batch = (tokens, tokens + 1, torch.zeros_like(tokens, dtype=torch.bool))
    plain, with_z_loss = TokenLossSum(model, 0.0), TokenLossSum(model, 0.1)
    expected = 0.1 * model(tokens).logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(with_z_loss(*batch)[0] - plain(*batch)[0], expected, rtol=1e-4, atol=0)
    assert torch.equal(with_z_loss.eval()(*batch)[0], plain(*batch)[0])
