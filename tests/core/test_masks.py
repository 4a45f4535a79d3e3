"""What a mask may say, and which layer can have it."""

from __future__ import annotations

import pytest

from automl_compress.core.graph import Layer
from automl_compress.core.masks import Mask, mask_problem, parse_mask
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError
from tests.search.networks import residual

LAYER = Layer(
    name="conv3", kind="conv", weight="conv3.weight", bias=None, in_channels=30, out_channels=8, kernel=(3, 3),
    input_shape=(1, 30, 4, 4), output_shape=(1, 8, 4, 4), params=2160, macs=34560,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("0.5", Mask(kind="ratio", value=0.5)),
        (".25 by row", Mask(kind="ratio", value=0.25, by_row=True)),
        ("<0.02", Mask(kind="threshold", value=0.02)),
        ("< 3 by row", Mask(kind="threshold", value=3, by_row=True)),
        ("2:4", Mask(kind="pattern", kept=2, of=4)),
        ("1:16", Mask(kind="pattern", kept=1, of=16)),
    ],
)
def test_forms_are_read(text: str, mask: Mask) -> None:
    assert parse_mask(text) == mask


@pytest.mark.parametrize("text", ["", "half", "0", "1", "1.5", "4:4", "0:4", "2:4:8", "2:4 by row", "<", "-0.5", "5:4"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="mask"):
        parse_mask(text)
    with pytest.raises(PlanError, match="mask"):
        Plan(masks={"conv3": text})


def test_a_pattern_needs_inputs_that_it_divides() -> None:
    assert mask_problem("2:4", LAYER) == (
        "conv3: 2:4 sparsity needs input channels divisible by 4, found 30; use 'none' for it in the search space"
    )
    assert mask_problem("1:2", LAYER) is None
    assert mask_problem("0.5", LAYER) is None
    assert mask_problem("none", LAYER) is None


def test_masks_are_part_of_what_a_plan_is() -> None:
    graph = residual()
    plan = Plan(masks={"b0.conv1": "2:4", "head": "none"})
    assert plan.key != Plan().key
    assert Plan(masks={"head": "none"}).key == Plan().key
    again = Plan.from_json(plan.to_json(graph), graph)
    assert again.key == plan.key
    assert dict(again.masks) == {"b0.conv1": "2:4"}
    assert Plan.from_json(Plan().to_json()).masks == {}
    with pytest.raises(PlanError, match="no layer 'nobody'"):
        Plan(masks={"nobody": "0.5"}).check(graph)
    with pytest.raises(PlanError, match="stem: 2:4 sparsity needs input channels divisible by 4, found 3"):
        Plan(masks={"stem": "2:4"}).check(graph)
