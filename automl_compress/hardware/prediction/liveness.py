"""How much of a sketch's values is alive at a time, with the copies that the runtime makes from one form to another.

A value is kept in floating point, behind a convolution in blocks of channels, or as 8-bit integers. A node that wants
another form reads a copy, which lives until the node is done; what it was made of goes earlier where nobody else reads
it. A copy in blocks is made in two steps from integers. Which node wants what is what the runtime does on x86.
"""

from __future__ import annotations

from collections import defaultdict

from automl_compress.hardware.prediction.sketch import Sketch

# Channels of a block of the runtime's layout.
_BLOCK = 16
_FLOAT = 4.0
# fmt: off
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish"})
# fmt: on
_ANY_LAYOUT = frozenset({"Add", "Mul", "Concat", "Clip", "Relu"})


def live_bytes(sketch: Sketch) -> float:
    """The peak over the nodes of a sketch, in bytes for one sample."""
    alive = _Alive(sketch)
    for position, end in enumerate(fused_ends(sketch)):
        if end >= position:
            alive.run(position, end)
    return alive.peak


def fused_ends(sketch: Sketch) -> list[int]:
    """For each node the one whose value it writes: the activation behind it, which is computed with it and has -1
    itself, else its own."""
    skeleton = sketch.skeleton
    ends = list(range(len(skeleton.ops)))
    for position, (op, sources) in enumerate(zip(skeleton.ops, skeleton.inputs, strict=True)):
        source = sources[0] if len(sources) == 1 else -1
        if op in _FUSED and source >= 0 and len(skeleton.users[source]) == 1 and not sketch.quantized[source]:
            ends[source], ends[position] = position, -1
    return ends


class _Alive:
    """What is alive while nodes run in order; `peak` is the most so far."""

    def __init__(self, sketch: Sketch) -> None:
        self.peak = 0.0
        self._sketch = sketch
        self._now = 0.0
        self._held = [0.0] * len(sketch.skeleton.ops)
        self._in_blocks = [False] * len(sketch.skeleton.ops)
        self._until: dict[int, float] = defaultdict(float)

    def run(self, position: int, end: int) -> None:
        """Run the node at `position`, whose value is that of `end`."""
        sketch, last = self._sketch, self._sketch.skeleton.last_users
        read = {source for source in sketch.skeleton.inputs[position] if source >= 0}
        copies = replaced = dead = 0.0
        for source in read:
            own = self._held[source] if last[source] == position else 0.0
            dead += own
            copy, between = self._copy(source, position, end)
            if copy:
                self._see(self._now - replaced + (between or copy))
                self._see(self._now - replaced - own + between + copy)
                copies, replaced = copies + copy, replaced + own
        floats, integer = _FLOAT * sketch.written_numbers[end], sketch.integer[position]
        blocked = self._wants_blocks(position)
        written = self._blocked_bytes(end) if blocked else sketch.written_numbers[end] if integer else floats
        self._see(self._now - replaced + copies + written)
        if sketch.quantized[end] != integer:
            small = float(sketch.written_numbers[end])
            self._see(self._now - dead + (written + floats if blocked else floats + small))
        passed_on = sketch.skeleton.ops[position] in _ANY_LAYOUT and any(self._in_blocks[source] for source in read)
        self._in_blocks[end] = (blocked or passed_on) and not sketch.quantized[end]
        self._keep(position, end)

    def _keep(self, position: int, end: int) -> None:
        """The value of `end` is there; those that were read for the last time are gone."""
        sketch = self._sketch
        numbers = sketch.written_numbers[end]
        held = (
            numbers if sketch.quantized[end] else self._blocked_bytes(end) if self._in_blocks[end] else _FLOAT * numbers
        )
        self._held[end] = held
        self._now += held
        self._see(self._now)
        self._until[sketch.skeleton.last_users[end]] += held
        for done in {position, end}:
            self._now -= self._until.pop(done, 0.0)

    def _copy(self, source: int, position: int, end: int) -> tuple[float, float]:
        """(bytes of the copy of a value that a node reads, of what is made on the way to it); zeros for none."""
        sketch = self._sketch
        numbers = float(sketch.written_numbers[source])
        blocks, integer = self._wants_blocks(position), sketch.integer[position]
        fits = sketch.written[source] >= _BLOCK
        if sketch.quantized[source]:
            if integer or (sketch.quantized[end] and not blocks):
                return 0.0, 0.0
            return (self._blocked_bytes(source), _FLOAT * numbers) if blocks and fits else (_FLOAT * numbers, 0.0)
        if integer:
            return numbers, _FLOAT * numbers if self._in_blocks[source] else 0.0
        if self._in_blocks[source]:
            leaves = not blocks and sketch.skeleton.ops[position] not in _ANY_LAYOUT
            return (self._blocked_bytes(source) if leaves else 0.0), 0.0
        return (self._blocked_bytes(source) if blocks and fits else 0.0), 0.0

    def _wants_blocks(self, position: int) -> bool:
        return self._sketch.skeleton.ops[position] == "Conv" and not self._sketch.integer[position]

    def _blocked_bytes(self, position: int) -> float:
        channels = max(self._sketch.written[position], 1)
        return _FLOAT * self._sketch.written_numbers[position] * (-(-channels // _BLOCK) * _BLOCK) / channels

    def _see(self, alive: float) -> None:
        self.peak = max(self.peak, alive)
