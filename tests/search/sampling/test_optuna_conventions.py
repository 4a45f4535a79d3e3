"""Optuna's own tests of samplers: run on ours, and on Optuna's where plans are projected onto the budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from automl_compress.core.budget import Budget, Cost
from automl_compress.core.plan import Plan
from automl_compress.search.sampling.sampler import OrdinalSampler, make_sampler
from automl_compress.search.solvers.decode import Decoder
from tests.search.networks import additive_cost, residual, space_of, table_for

optuna.logging.set_verbosity(optuna.logging.ERROR)


@cache
def _decoder() -> Decoder:
    graph = residual(blocks=0, size=4, stem=2)
    space = space_of(graph, sparsity=[0.5])
    return Decoder(space, graph, table_for(space, graph))


def _predict(plan: Plan) -> Cost:
    return additive_cost(_decoder().table, _decoder().graph, plan)


def _made(name: str) -> BaseSampler:
    budget = Budget(limits={"latency": 0.5 * _predict(Plan()).latency_us})
    return make_sampler(
        name,
        space=_decoder().space,
        decoder=_decoder(),
        limits=budget,
        predict=_predict,
        seed=0,
    )


class TestBudgetSampler(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: _made("budget")


class TestProjectedSampler(RelativeSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: _made("random:project")


class TestOrdinalSampler(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: OrdinalSampler(lambda seed: optuna.samplers.RandomSampler(seed=seed))
