"""Training in several processes, a GPU each: every process reads the same batches and computes its part of them.

Gradients, losses, the statistics of batch-norms and what the objective remembers are averaged after every step, and all
compute in pieces of one size, so that the processes stay equal but for rounding, which kernels may do differently from
one process to the other. So weights and metrics are averaged, too, wherever something is decided and in the end. They
are started and connected by Hugging Face's accelerate (`accelerate launch`), an optional extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from automl_compress.errors import TrainingError
from automl_compress.model.task import Batch


class Processes:
    """The processes that train together; just this one without an `accelerate.Accelerator`."""

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.index = 0 if accelerator is None else int(accelerator.process_index)

    @property
    def device(self) -> torch.device | None:
        """This process's device, None where it is free to choose."""
        return None if self._accelerator is None else self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.index == 0

    def part(self, batch: Batch) -> Batch:
        """This process's samples; all have equally many, a remainder is left out. Raises TrainingError."""
        if self.count == 1:
            return batch
        inputs, targets = batch
        share = len(targets) // self.count
        if not share or any(len(part) != len(targets) for part in inputs):
            raise TrainingError(
                f"a batch of {len(targets)} can't be divided among {self.count} processes; use larger batches"
            )
        rows = slice(self.index * share, (self.index + 1) * share)
        return tuple(part[rows] for part in inputs), targets[rows]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.count == 1:
            return
        for precision in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == precision]
            flat = self._accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in alike]), reduction="mean")
            for tensor, mean in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def mean(self, value: float | Tensor) -> float:
        """The mean of the processes' values."""
        if self.count > 1:
            mean = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
            self.average([mean])
            value = mean
        return float(value)

    def least(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.count == 1:
            return value
        return int(self._accelerator.gather(torch.tensor([value], device=self._accelerator.device)).min())
