"""Plans are plain data: they survive JSON, compare by what they choose, and refuse other models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from automl_compress.core.graph import Block, ChannelGroup, Graph, Layer, Place
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError


def layer(name: str, inputs: int, outputs: int, **links: object) -> Layer:
    return Layer(
        name=name,
        kind="conv",
        weight=f"{name}.weight",
        bias=None,
        in_channels=inputs,
        out_channels=outputs,
        input_shape=(1, inputs, 4, 4),
        output_shape=(1, outputs, 4, 4),
        params=inputs * outputs,
        macs=inputs * outputs * 16,
        **links,
    )


def place(tensor: str, dim: int, size: int, copies: int, role: str) -> Place:
    positions = tuple(tuple(range(c * copies, (c + 1) * copies)) for c in range(size))
    return Place(tensor=tensor, dim=dim, positions=positions, role=role)


GRAPH = Graph(
    layers=(
        layer("a", 3, 8, out_groups=("a",)),
        layer("b", 16, 8, in_groups=("a",), blocks=("branch",)),
        layer("dw", 8, 8, groups=8, in_axis=0, in_groups=("a",), out_groups=("a",)),
    ),
    groups=(
        ChannelGroup(
            name="a",
            size=8,
            producers=("a",),
            consumers=("b",),
            places=(
                place("a.weight", 0, 8, 1, "producer"),
                place("dw.weight", 0, 8, 1, "follower"),
                place("b.weight", 1, 8, 2, "consumer"),
            ),
        ),
    ),
    blocks=(Block(name="branch", layers=("b",), modules=("b",), output="b", addition="add", shape=(1, 8, 4, 4)),),
)
FULL = Plan(width=0.5, sparsity={"a": 0.5}, drop=frozenset({"branch"}), bits={"a": 8}, kept={"a": (1, 6)})


def test_a_plan_survives_json() -> None:
    data = json.loads(json.dumps(FULL.to_json(GRAPH)))
    assert Plan.from_json(data, GRAPH) == FULL


def test_the_key_says_what_was_chosen_and_not_which_channels_that_were() -> None:
    assert FULL.key == replace(FULL, kept={}).key
    assert Plan(bits={"a": 32}, sparsity={"a": 0.0}).key == Plan().key
    assert FULL.key != replace(FULL, width=1.0).key


def test_widths_follow_every_copy_of_a_channel() -> None:
    assert Plan(sparsity={"a": 0.5}).widths(GRAPH) == {"a": (3, 4), "b": (8, 8), "dw": (4, 4)}
    assert "b" not in Plan(drop=frozenset({"branch"})).widths(GRAPH)


def test_one_channel_always_stays() -> None:
    assert Plan(width=0.1, sparsity={"a": 0.99}).kept_count("a", 8) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "not a plan"),
        ({"version": 99}, "version 99"),
        ({"graph": "feedbeef"}, "another model"),
        ({"width": "wide"}, "wrong type"),
        ({"width": 0}, r"width must be in \(0, 1\]"),
        ({"sparsity": {"a": 1.0}}, "sparsity of a"),
        ({"sparsity": {"nobody": 0.5}}, "no channel group 'nobody'"),
        ({"drop": ["nobody"]}, "no block 'nobody'"),
        ({"bits": {"nobody": 8}}, "no layer 'nobody'"),
        ({"kept": {"a": []}}, "kept channels of a"),
        ({"kept": {"a": [3, 3]}}, "kept channels of a"),
        ({"kept": {"a": [9]}}, "kept channels of a"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json({**FULL.to_json(GRAPH), **change}, GRAPH)
    assert "\n" not in str(caught.value)
