"""A plan's counts become channels: the most important ones, the same on every machine, and the model is cut to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from automl_compress.core.graph import ChannelGroup, Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError
from automl_compress.model.trace import trace
from automl_compress.techniques.evidence import Evidence
from automl_compress.techniques.importance import l2
from automl_compress.techniques.prune import Ranking, apply_plan, prune_by, select_channels
from tests.model.networks import INPUT, make

MODEL = make("ResNet")
X = torch.randn(INPUT, generator=torch.Generator().manual_seed(0))
GRAPH = trace(MODEL, (X,))
EVIDENCE = Evidence(MODEL, GRAPH)
RANKING = Ranking(EVIDENCE, l2)
NAMES = [group.name for group in GRAPH.groups]
PLANS = st.builds(
    Plan,
    width=st.sampled_from([1.0, 0.75, 0.5, 0.1]),
    sparsity=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.25, 0.5, 0.9])),
    drop=st.frozensets(st.sampled_from([block.name for block in GRAPH.blocks])),
)


@given(PLANS)
def test_the_cut_model_has_the_widths_that_the_plan_says(plan: Plan) -> None:
    chosen = select_channels(GRAPH, plan, RANKING)
    small = apply_plan(MODEL, GRAPH, chosen)
    modules = dict(small.named_modules())
    for name, (inputs, outputs) in plan.widths(GRAPH).items():
        layer = modules[name]
        found = (
            (layer.in_channels, layer.out_channels)
            if isinstance(layer, nn.Conv2d)
            else (layer.in_features, layer.out_features)
        )
        assert found == (inputs, outputs)
    assert small(X).shape == MODEL(X).shape
    assert plan.widths(GRAPH) == chosen.widths(GRAPH)
    assert plan.key == chosen.key


@given(PLANS)
def test_a_selected_plan_replays_without_looking_at_weights(plan: Plan) -> None:
    chosen = select_channels(GRAPH, plan, RANKING)
    again = Plan.from_json(chosen.to_json(GRAPH), GRAPH)
    assert again.kept == chosen.kept
    assert again.key == chosen.key
    if chosen.kept:
        assert select_channels(GRAPH, again, Ranking(Evidence(make("ResNet", seed=9), GRAPH), l2)) == again


def test_the_kept_channels_are_the_best_and_nested() -> None:
    for group in GRAPH.groups:
        scores = l2(EVIDENCE, group)
        before: set[int] = set()
        for count in range(1, group.size + 1):
            kept = RANKING.best(group.name, count)
            assert list(kept) == sorted(kept)
            assert before < set(kept)
            rest = [i for i in range(group.size) if i not in kept]
            assert not rest or scores[list(kept)].min() >= scores[rest].max()
            before = set(kept)


def test_equal_scores_keep_the_first_channels() -> None:
    def equal(evidence: Evidence, group: ChannelGroup) -> Tensor:
        return torch.ones(group.size)

    assert Ranking(EVIDENCE, equal).best(NAMES[0], 3) == (0, 1, 2)


def test_a_group_that_the_criterion_says_nothing_about_goes_by_magnitude_and_is_named() -> None:
    def picky(evidence: Evidence, group: ChannelGroup) -> Tensor | None:
        return None if group.name == NAMES[1] else torch.arange(float(group.size))

    ranking = Ranking(EVIDENCE, picky)
    assert ranking.substituted == [NAMES[1]]
    assert ranking.best(NAMES[1], 2) == RANKING.best(NAMES[1], 2)
    size = GRAPH.group[NAMES[0]].size
    assert ranking.best(NAMES[0], 2) == (size - 2, size - 1)


@given(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]))
def test_a_ratio_takes_the_lowest_of_each_group_or_of_all(ratio: float) -> None:
    local = prune_by(GRAPH, RANKING.scores, ratio=ratio)
    assert {g.name: local.kept_count(g.name, g.size) for g in GRAPH.groups} == {
        g.name: max(1, g.size - round(ratio * g.size)) for g in GRAPH.groups
    }
    plan = prune_by(GRAPH, RANKING.scores, ratio=ratio, across_groups=True)
    total = sum(group.size for group in GRAPH.groups)
    gone = {g.name: [c for c in range(g.size) if c not in plan.kept.get(g.name, range(g.size))] for g in GRAPH.groups}
    starved = [name for name, channels in gone.items() if len(channels) == GRAPH.group[name].size - 1]
    assert sum(map(len, gone.values())) == round(ratio * total) or starved
    if not starved and ratio:
        left = min(float(RANKING.scores[n][c]) for n, k in plan.kept.items() for c in k)
        assert max(float(RANKING.scores[n][c]) for n, channels in gone.items() for c in channels) <= left
    assert apply_plan(MODEL, GRAPH, plan)(X).shape == MODEL(X).shape


def test_a_threshold_takes_what_scores_below_it_but_never_a_whole_group() -> None:
    threshold = float(torch.cat(list(RANKING.scores.values())).median())
    plan = prune_by(GRAPH, RANKING.scores, threshold=threshold)
    for group in GRAPH.groups:
        wanted = [c for c in range(group.size) if RANKING.scores[group.name][c] >= threshold]
        assert list(plan.kept.get(group.name, range(group.size))) == (wanted or list(RANKING.best(group.name, 1)))
    everything = prune_by(GRAPH, RANKING.scores, threshold=float("inf"), keep_at_least=2)
    assert {group.name: len(everything.kept[group.name]) for group in GRAPH.groups} == dict.fromkeys(NAMES, 2)
    assert everything.widths(GRAPH) == Plan(sparsity=everything.sparsity).widths(GRAPH)


@pytest.mark.parametrize(
    ("how", "words"),
    [({}, "ratio or a threshold"), ({"ratio": 0.5, "threshold": 1.0}, "not both"), ({"ratio": 1.0}, "1")],
)
def test_how_much_must_be_said_once_and_leave_something(how: dict[str, float], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        prune_by(GRAPH, RANKING.scores, **how)


def test_a_plan_that_does_nothing_changes_nothing() -> None:
    plan = select_channels(GRAPH, Plan(), RANKING)
    assert plan.kept == {}
    small = apply_plan(MODEL, GRAPH, plan)
    assert small is not MODEL
    assert torch.equal(small(X), MODEL(X))


def test_a_removed_block_leaves_its_shortcut() -> None:
    small = apply_plan(MODEL, GRAPH, Plan(drop=frozenset({"first"})))
    torch.testing.assert_close(
        small(X), MODEL.head(MODEL.second(torch.relu(MODEL.stem(X))).mean((2, 3))), rtol=1e-5, atol=1e-5
    )
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in MODEL.parameters())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(kept={"nobody": (0,)}), "no channel group 'nobody'"),
        (Plan(drop=frozenset({"nobody"})), "no block 'nobody'"),
        (Plan(bits={"nobody": 8}), "no layer 'nobody'"),
        (Plan(kept={"stem": ()}), "kept channels of stem"),
        (Plan(kept={"stem": (0, 8)}), "kept channels of stem"),
        (Plan(kept={"stem": (3, 1)}), "kept channels of stem"),
    ],
)
def test_another_models_plan_is_refused(plan: Plan, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        apply_plan(MODEL, GRAPH, plan)


def test_the_original_is_never_modified() -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    small = apply_plan(MODEL, GRAPH, select_channels(GRAPH, Plan(width=0.5), RANKING))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


def test_the_graph_is_the_tested_one() -> None:
    assert isinstance(GRAPH, Graph)
    assert len(NAMES) == 4
    assert [block.name for block in GRAPH.blocks] == ["first", "second"]
