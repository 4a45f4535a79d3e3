"""An exponential moving average of a model's weights (Polyak and Juditsky 1992; Tarvainen and Valpola 2017)."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """The average of a model's floating-point state; counters are taken over as they are.

    decay  of the average by step. It is lower at first, min(decay, (1 + n) / (10 + n)) at update n, so that the start
           doesn't linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        self.state = {name: value.clone() for name, value in self._live.items()}
        self._floats = [name for name, value in self._live.items() if value.is_floating_point()]
        self._counters = [name for name, value in self._live.items() if not value.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights that the model has now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours, theirs = [self.state[n] for n in self._floats], [self._live[n] for n in self._floats]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for name in self._counters:
            self.state[name].copy_(self._live[name])
