"""Channel indices as values: which indices of which tensors are the same channel.

Every index of every dimension of every parameter gets a number. Operators tie numbers together (a residual addition
makes channel 3 of both sides one channel); what remains apart can be removed apart. An operator that is not understood
freezes the numbers that flow into it.
"""

from __future__ import annotations

import numpy as np

Ids = np.ndarray  # int64 [size of the dimension]
Labels = tuple[Ids | None, ...]  # one entry a dimension; None: this dimension carries no channels


class Channels:
    """A union-find over channel numbers with a reason for each class that must not be cut."""

    def __init__(self) -> None:
        self._parent = np.empty(0, dtype=np.int64)
        self._frozen: dict[int, str] = {}

    def fresh(self, count: int) -> Ids:
        """`count` new channels that are tied to nothing."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        return np.arange(start, start + count)

    def root(self, ids: Ids) -> Ids:
        """The representative of each channel's class."""
        roots: Ids = self._parent[ids]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[ids] = roots
        return roots

    def tie(self, left: Ids, right: Ids) -> None:
        """Make left[i] and right[i] the same channel, for every i."""
        # Pair by pair: one vectorised pass would lose unions where a root appears twice (a flattened channel).
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            a, b = self._find(one), self._find(other)
            if a != b:
                self._parent[max(a, b)] = min(a, b)
                reason = self._frozen.pop(max(a, b), None)
                if reason is not None:
                    self._frozen.setdefault(min(a, b), reason)

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """These channels must stay, whatever else is tied to them. The first reason is kept."""
        if ids is not None:
            for root in set(self.root(ids).tolist()):
                self._frozen.setdefault(root, reason)

    def frozen(self, channel: int) -> str | None:
        """Why a channel must stay, or None."""
        return self._frozen.get(self._find(channel))

    def _find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = int(self._parent[channel])
        return channel
