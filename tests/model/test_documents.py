"""Document starts are exact: no number of an earlier document has a part in a later one, forwards or backwards."""

import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def run(model, batch, scored):
    """Losses, logits, and the gradients of the loss over the tokens that `scored` [B, S] marks."""
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.zero_grad()
    handle = model.embedding.register_forward_hook(keep)
    targets = batch["targets"].masked_fill(~scored, -100)
    losses = model(batch["tokens"], targets=targets, document_start=batch["document_start"]).token_losses
    losses.sum().backward()
    handle.remove()
    with torch.no_grad():
        logits = model(batch["tokens"], document_start=batch["document_start"]).logits
    parameters = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return losses.detach(), logits, parameters, embedded[0].grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changing_document_1_leaves_later_documents_bitwise_unchanged(config, make_model, make_batch, dtype):
    model = make_model(config, dtype)
    batch = make_batch()
    first_document = (batch["document_start"].cumsum(1) == 1) & torch.tensor([[True], [False]])
    later = ~first_document
    losses, logits, parameters, embedded = run(model, batch, scored=later)
    assert embedded[later].abs().sum() > 0

    tokens = torch.where(first_document, (batch["tokens"] + 17) % 61, batch["tokens"])
    other_losses, other_logits, other_parameters, other_embedded = run(model, {**batch, "tokens": tokens}, scored=later)

    assert not torch.equal(logits[first_document], other_logits[first_document])
    assert torch.equal(logits[later], other_logits[later])
    assert torch.equal(losses, other_losses)
    assert not embedded[first_document].any() and not other_embedded[first_document].any()
    assert torch.equal(embedded, other_embedded)
    for name, gradient in parameters.items():
        assert torch.equal(gradient, other_parameters[name]), name


def test_a_packed_document_gives_what_it_gives_alone(config, make_model, make_batch):
    model = make_model(config)
    batch = make_batch()
    packed = model(batch["tokens"], document_start=batch["document_start"]).logits
    for row, start, end in ((0, 0, 11), (0, 11, 13), (0, 13, 14), (0, 14, 29), (1, 0, 19), (1, 19, 29)):
        alone = model(batch["tokens"][row : row + 1, start:end]).logits
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=0, atol=1e-9)


def test_without_document_starts_the_first_document_is_seen(config, make_model, make_batch):
    model = make_model(config)
    batch = make_batch()
    separate = model(batch["tokens"], document_start=batch["document_start"]).logits
    together = model(batch["tokens"]).logits
    assert (separate - together)[0, 14:].abs().max() > 1e-6


def test_a_document_start_drops_the_incoming_state_bitwise(config, make_model, make_batch):
    model = make_model(config)
    batch = make_batch()
    start = batch["document_start"]
    assert start[:, 0].all()
    states = [model((batch["tokens"] + shift) % 61, document_start=start, return_state=True).state for shift in (0, 23)]
    fresh = model(batch["tokens"], document_start=start).logits
    for length in (29, 1):
        continued = [
            model(batch["tokens"][:, :length], document_start=start[:, :length], state=state).logits for state in states
        ]
        assert torch.equal(*continued)
        torch.testing.assert_close(continued[0], fresh[:, :length], rtol=0, atol=1e-9)
