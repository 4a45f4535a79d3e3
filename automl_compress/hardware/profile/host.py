"""What machine and what runtime a device is, as values: the facts that decide whether a measurement still holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from automl_compress.hardware.measuring.machine import machine_facts


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One machine with its runtime.

    flags         instruction sets that kernels are chosen by
    cores         logical ones
    onnxruntime   its version, "none" if it isn't installed
    memory_bytes  all that it has, None if unknown; no part of its identity, and neither are
    providers     what its runtime offers; empty unless the measuring process was asked
    """

    REQUIRED: ClassVar = ("architecture", "cpu", "flags", "cores", "system", "onnxruntime")

    architecture: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    system: str
    onnxruntime: str
    memory_bytes: int | None = None
    providers: tuple[str, ...] = ()

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> HostFacts:
        """From what the measuring process answers to "facts". Raises KeyError if one of REQUIRED is missing."""
        return cls(
            architecture=str(answer["architecture"]),
            cpu=str(answer["cpu"]),
            flags=tuple(answer["flags"]),
            cores=int(answer["cores"]),
            system=str(answer["system"]),
            onnxruntime=str(answer["onnxruntime"]),
            memory_bytes=answer.get("memory_bytes"),
            providers=tuple(answer.get("providers", ())),
        )


def host_facts() -> HostFacts:
    """The facts of this machine, without starting a measuring process."""
    return HostFacts.from_answer(machine_facts())
