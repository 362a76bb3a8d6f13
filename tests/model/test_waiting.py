"""What a pass must not do because a GPU would have to be waited for, as far as a CPU shows it."""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.statistics import recording

# Numbers that are read from a device or copied to it: `.item()`, numbers as tensors in `torch.where`, torch.tensor,
# and shapes that depend on values.
WAITING = {"aten._local_scalar_dense", "aten.scalar_tensor", "aten.lift_fresh", "aten.nonzero", "aten.masked_select"}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()
        self.counts = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func.overloadpacket)] += self.counts
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch):
    """Not those inside PyTorch's attention, which makes its numbers on the device."""
    calls, attention = Calls(), F.scaled_dot_product_attention

    def uncounted(*arguments, **settings):
        calls.counts = False
        result = attention(*arguments, **settings)
        calls.counts = True
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", uncounted)
    return calls


def test_such_calls_are_seen(calls):
    x = torch.ones(3)
    with calls:
        torch.where(x > 0, x, 0)
        x.sum().item()
        torch.tensor([1, 2])
        x.nonzero()
    assert {"aten.scalar_tensor", "aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero"} <= calls.found.keys()


@pytest.mark.parametrize("records", [False, True], ids=["training", "recording"])
def test_a_pass_waits_for_nothing(calls, small_configs, make_model, make_batch, records):
    for name, config in small_configs.items():
        model, batch = make_model(config), make_batch()
        with calls:
            if records:
                with recording() as recorded:
                    model(**batch)
                recorded.values(), recorded.profiles()
            else:
                model(**batch).token_losses.sum().backward()
        waiting = {call for call, number in calls.found.items() if number} & WAITING
        assert not waiting, (name, waiting)
