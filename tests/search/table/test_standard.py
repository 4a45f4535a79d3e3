from __future__ import annotations

import itertools

import onnxruntime
import pytest

from automl_compress.hardware.device.kernels import structure_digest
from automl_compress.hardware.measuring.sessions import random_inputs
from automl_compress.search.table.standard import KINDS, standard_models


def test_every_kind_runs_in_32_bits_in_8_and_in_a_mixture() -> None:
    models = list(itertools.islice(standard_models(), 6 * len(KINDS)))
    assert {name.split("-")[0] for name, _ in models} == set(KINDS)
    for name, model in models:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        assert session.run(None, random_inputs(session)), name


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_makes_the_same_models(seed: int) -> None:
    one, other = (
        [(name, structure_digest(model)) for name, model in itertools.islice(standard_models(seed), 12)] for _ in "ab"
    )
    assert one == other
    assert len({digest for _, digest in one}) == len(one)
