"""Where and how a training step is computed: device, precision, memory layout. Chosen by rule, never by timing, so that
the same machine always computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from automl_compress.errors import InputError
from automl_compress.model.task import Batch
from automl_compress.techniques.training.settings import Resources


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was chosen. `precision` is that of convolutions and products; weights, sums and the loss stay in float32."""

    device: torch.device
    precision: torch.dtype
    channels_last: bool

    @classmethod
    def choose(cls, student: nn.Module, resources: Resources, given: torch.device | None = None) -> Placement:
        """For a model on what a training may use, and on the device that is `given` to this process, if one is. Raises
        InputError for a device that isn't there."""
        device = given or device_of(resources.device)
        four = any(parameter.ndim == 4 for parameter in student.parameters())
        return cls(device=device, precision=precision_of(resources, device), channels_last=four)

    def place(self, module: nn.Module) -> None:
        """Bring a module to the device, in the layout in which it is trained."""
        module.to(self.device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return tuple(self._input(part) for part in inputs), targets.to(self.device, non_blocking=True)

    def _input(self, part: Tensor) -> Tensor:
        if self.channels_last and part.ndim == 4:
            return part.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return part.to(self.device, non_blocking=True)

    @contextmanager
    def computing(self, student: nn.Module) -> Iterator[None]:
        """Within, products run in the chosen precision while the student is in train mode, and what it puts out is
        float32. In eval mode it computes as it will be delivered."""
        if self.precision == torch.float32:
            yield
            return
        handle = student.register_forward_hook(_in_float32)
        try:
            yield
        finally:
            handle.remove()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    @property
    def words(self) -> str:
        layout = ", channels last" if self.channels_last else ""
        return f"{self.device}, {str(self.precision).removeprefix('torch.')}{layout}"


def device_of(name: str) -> torch.device:
    """The device of this name; 'auto' is CUDA where there is one. Raises InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"training: device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"training: device must be auto, cpu or cuda, found {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"training: there is no device {name!r} here; use auto or cpu")
    return device


def precision_of(resources: Resources, device: torch.device) -> torch.dtype:
    """What was asked for; 'auto' is bfloat16 where the device multiplies it in hardware of its own (matrix units of
    GPUs, and processors with AMX or AVX-512 BF16; elsewhere it is slower), else float32."""
    if resources.precision != "auto":
        return getattr(torch, resources.precision)  # type: ignore[no-any-return]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def _in_float32(module: nn.Module, arguments: Any, outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda part: part.float() if part.dtype == torch.bfloat16 else part, outputs)
