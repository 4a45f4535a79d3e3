"""What comes out of an exported model is handed to a task as the model itself returns it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from automl_compress.model.outputs import arranged, joined

A, B = torch.rand(2, 3), torch.rand(2, 5)
Pair = namedtuple("Pair", ["scores", "boxes"])
CONTAINERS = [A, (A, B), {"scores": A, "boxes": B}, OrderedDict(scores=A, inside=(B, None)), [A, {"x": B}], Pair(A, B)]


@pytest.mark.parametrize("outputs", CONTAINERS)
def test_tensors_are_arranged_as_in_the_models_own_outputs(outputs: Any) -> None:
    leaves, structure = tree_flatten(outputs)
    tensors = [leaf + 1 for leaf in leaves if isinstance(leaf, Tensor)]
    found, same = tree_flatten(arranged(tensors, outputs))
    assert same == structure
    assert all(torch.equal(x, y) for x, y in zip([x for x in found if x is not None], tensors, strict=True))


def test_what_is_no_container_that_torch_knows_gives_a_tuple() -> None:
    assert arranged([A, B], object()) == (A, B)
    assert arranged([A], object()) is A


@pytest.mark.parametrize("outputs", CONTAINERS[:4])
def test_batches_are_joined_in_their_container(outputs: Any) -> None:
    whole = joined([outputs, outputs])
    for part, twice in zip(tree_flatten(outputs)[0], tree_flatten(whole)[0], strict=True):
        assert twice is None if part is None else torch.equal(twice, torch.cat([part, part]))
