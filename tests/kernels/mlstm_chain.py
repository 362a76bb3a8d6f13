"""Slices of one sequence in one process, each with a graph of gradients of its own.

The backward passes go from the last slice to the first, and what crosses the borders between them goes through here.
"""

import torch

from kernels.mlstm import CellSettings, MLSTMState, cell_inputs, combine, mlstm_slice, mlstm_state
from kernels.mlstm.slices import SliceSummary


class ChainBorder:
    """A kernels.mlstm.Border. `behind`: that of the next slice; `summary`: of this one."""

    def __init__(self, summary, behind=None, is_first=False):
        self.summary, self.behind, self.is_first = summary, behind, is_first
        self.gradient = None
        self.calls = []

    def start_back(self, gradient):
        self.calls.append("start_back")
        self.gradient = gradient

    def leaving_gradient(self):
        self.calls.append("leaving_gradient")
        return None if self.behind is None else self.behind.of_entering()

    def of_entering(self):
        """The gradient of the state that enters this slice, by all that follows: that by itself and by the later."""
        later = None if self.behind is None else self.behind.of_entering()
        if later is None:
            return self.gradient
        own = SliceSummary(self.gradient, self.summary.log_forget_sum, self.summary.document_started)
        return combine(SliceSummary.of_state(later), own).state


def run_chain(slices, before, settings=None, backend="auto"):
    """Every slice by `mlstm_slice`: their h one behind the other, the last state, and a function for the gradients.

    Args:
        slices: q, k, v, gates and document_start (or None) of each.
        before: the state before the first.
    """
    settings = CellSettings() if settings is None else settings
    chosen = {"gate": settings.gate, "normaliser": settings.normaliser, "backend": backend}
    own = [[x.detach().clone().requires_grad_() for x in cut[:5]] for cut in slices]
    starts = [cut[5] for cut in slices]
    with torch.no_grad():
        summaries = [
            mlstm_state(*tokens[1:], document_start=start, **chosen) for tokens, start in zip(own, starts, strict=True)
        ]
    borders = [None] * len(slices)
    for place in reversed(range(len(slices))):
        behind = borders[place + 1] if place + 1 < len(slices) else None
        borders[place] = ChainBorder(summaries[place], behind, is_first=place == 0)
    initial = MLSTMState(*(x.detach().clone().requires_grad_() for x in (before.C, before.n)), before.m)
    entering, outputs = SliceSummary.of_state(initial.detach()), []
    for tokens, start, summary, border in zip(own, starts, summaries, borders, strict=True):
        inputs = cell_inputs(*tokens[1:], start, entering.state)
        outputs.append(mlstm_slice(tokens[0], inputs, settings, border=border, before=initial, backend=backend))
        entering = combine(entering, summary)

    def gradients(grad_h, grad_C, grad_n):
        """Of q, k, v and the gates of the whole sequence and of the initial C and n, from those of h and of the end."""
        found = []
        edges = torch.tensor([len(h[0]) for h, _ in outputs]).cumsum(0).tolist()
        for place in reversed(range(len(own))):
            h, state = outputs[place]
            results = {h: grad_h[:, edges[place] - h.shape[1] : edges[place]].to(h.dtype)}
            if place == len(own) - 1:
                results |= {state.C: grad_C, state.n: grad_n}
            found.insert(0, torch.autograd.grad([*results], [*own[place], initial.C, initial.n], [*results.values()]))
            assert borders[place].calls == ["start_back", "leaving_gradient"]
        *tokens, of_C, of_n = zip(*found, strict=True)
        return [*(torch.cat(of_one, 1) for of_one in tokens), sum(of_C), sum(of_n)]

    return torch.cat([h for h, _ in outputs], 1), outputs[-1][1], gradients
