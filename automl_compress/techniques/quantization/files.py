"""What is known about a model's integers as named tensors beside its weights, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from automl_compress.errors import PlanError
from automl_compress.techniques.quantization.tune import Limits, Quantization
from automl_compress.techniques.quantization.weights import QuantizedWeight

PREFIX = "quantization/"
_WEIGHT, _TENSOR = PREFIX + "weight/", PREFIX + "tensor/"


def to_tensors(found: Quantization) -> dict[str, Tensor]:
    """Integers, scales and changed initializers under names that begin with PREFIX; ranges are not among them."""
    result: dict[str, Tensor] = {}
    for layer, weight in found.weights.items():
        result[f"{_WEIGHT}{layer}/integers"] = torch.from_numpy(weight.integers)
        result[f"{_WEIGHT}{layer}/scales"] = torch.from_numpy(weight.scales)
        result[f"{_WEIGHT}{layer}/form"] = torch.tensor([weight.bits, weight.block])
        if weight.zeros is not None:
            result[f"{_WEIGHT}{layer}/zeros"] = torch.from_numpy(weight.zeros)
    result |= {f"{_TENSOR}{name}": torch.from_numpy(np.array(value)) for name, value in found.tensors.items()}
    return {name: value.contiguous() for name, value in result.items()}


def from_tensors(stored: Mapping[str, Tensor], ranges: Mapping[str, Limits]) -> Quantization:
    """The reverse of `to_tensors`; names without PREFIX are passed over. Raises PlanError where one is missing."""
    layers = {name[len(_WEIGHT) :].rpartition("/")[0] for name in stored if name.startswith(_WEIGHT)}
    weights = {}
    for layer in sorted(layers):
        parts = {part: stored.get(f"{_WEIGHT}{layer}/{part}") for part in ("integers", "scales", "form", "zeros")}
        integers, scales, form, zeros = (None if part is None else part.numpy() for part in parts.values())
        if integers is None or scales is None or form is None:
            raise PlanError(f"the weights' file lacks a part of the integers of {layer}")
        bits, block = (int(number) for number in form)
        weights[layer] = QuantizedWeight(bits=bits, integers=integers, scales=scales, zeros=zeros, block=block)
    tensors = {name[len(_TENSOR) :]: value.numpy() for name, value in stored.items() if name.startswith(_TENSOR)}
    return Quantization(ranges=ranges, weights=weights, tensors=tensors)
