"""Rules that go by operator, pattern and size; errors that say which line is wrong, and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from automl_compress.errors import SpaceError
from automl_compress.search.space.rules import Match, SpaceFile, load_space
from automl_compress.search.space.space import SearchSpace, resolve
from automl_compress.search.space.targets import Comparison, targets_of
from tests.search.networks import NATIVE, depthwise, residual
from tests.search.space.test_space import made

GROUP = {"kind": "channel-group"}


def matched(graph: object, **match: object) -> list[str]:
    return [t.name for t in targets_of(graph) if Match.model_validate(match).fits(t)]  # type: ignore[arg-type]


def test_rules_go_by_size() -> None:
    graph = residual(size=8, stem=4)
    assert matched(graph, kind="layer", parameters=">=576") == [
        *("widen", "b0.conv1", "b0.conv2"),
        "b1.conv1",
        "b1.conv2",
    ]
    assert matched(graph, kind="layer", parameters="<576") == ["stem", "head"]
    assert matched(graph, kind="layer", channels=10) == ["head"]
    assert matched(graph, kind="channel-group", channels=">4") == ["b0.conv1", "b1.conv1"]
    assert matched(graph, kind="channel-group", parameters="<200") == ["stem"]
    assert matched(graph, kind="block", parameters=">1_000", macs="<=1000000") == ["b0", "b1"]
    both = {"kind": "layer", "channels": "<10", "macs": ">80"}
    assert set(matched(graph, **both)) == {t.name for t in targets_of(graph) if t.kind == "layer"} - {"head"}


@pytest.mark.parametrize("value", [0, 63, 64, 65])
def test_comparisons_mean_what_they_say(value: int) -> None:
    said = {">=64": value >= 64, ">64": value > 64, "<= 64": value <= 64, "<64": value < 64, "64": value == 64}
    assert {text: Comparison.parse(text)(value) for text in said} == said


def test_rules_go_by_operator_and_kernel() -> None:
    graph = depthwise()
    assert matched(graph, kind="layer", operator="depthwise") == ["mix"]
    assert matched(graph, kind="layer", operator="conv") == ["expand", "mix", "project"]
    assert matched(graph, kind="layer", kernel="3x3") == matched(graph, kind="layer", kernel=3)
    assert matched(graph, kind="layer", kernel=1) == []
    assert matched(residual(), kind="layer", kernel="3x3")[-1] == "b1.conv2"


def always(*rules: dict[str, object]) -> SearchSpace:
    return made(residual(), {"match": {"kind": "block", "name": "b0"}, "drop": "always"}, *rules)


def test_what_always_goes_is_not_decided_about() -> None:
    space = always({"match": {"kind": "layer"}, "bits": [8]}, {"match": GROUP, "sparsity": [0.5]})
    assert {d.name for d in space.decisions} == {
        *("bits.stem", "bits.widen", "bits.b1.conv1", "bits.b1.conv2", "bits.head"),
        *("sparsity.stem", "sparsity.b1.conv1"),
    }
    assert [e.reason for e in space.left_out if e.decision == "bits.b0.conv1"] == ["block b0 always goes"]
    assert space.plan({}).drop == {"b0"}


def test_a_rule_for_what_another_rule_removes_is_a_contradiction() -> None:
    with pytest.raises(SpaceError, match=r"rule 2 .* contradicts another rule: b0.conv1 is in a block that"):
        always({"match": {"kind": "layer", "name": "b0.*"}, "bits": [8]})


def test_an_unused_rule_is_named_with_what_there_is() -> None:
    with pytest.raises(
        SpaceError, match=r"rule 1 .*b0.conv3.* matches nothing; .*operators conv, linear; .*did you mean b0.conv"
    ):
        made(residual(), {"match": {"kind": "layer", "name": "b0.conv3"}, "bits": [8]})
    with pytest.raises(SpaceError, match=r"channel-groups: stem, b0.conv1, b1.conv1; operators conv; 4 to 8 channels"):
        made(residual(), {"match": {**GROUP, "channels": ">8"}, "sparsity": [0.5]})
    with pytest.raises(SpaceError, match="matches nothing; the network has no block"):
        made(depthwise(), {"match": {"kind": "block"}, "drop": True})


HEAD = "name: mine\nrules:\n  - match: {kind: layer}\n    bits: 8\n"
WRONG = {
    "a key twice": ("name: mine\nrules: []\nname: other\n", 3, "'name' is given twice, first in line 1"),
    "a key twice in a rule": (HEAD + "    bits: [4]\n", 5, "'bits' is given twice, first in line 4"),
    "an unknown field": (HEAD + "widht: 0.5\n", 5, "unknown field 'widht'; did you mean 'width'?"),
    "a field of the match": (HEAD + "    channels: 4\n", 5, "'channels'; 'channels' belongs to the match"),
    "a field of the rule": ("name: x\nrules:\n  - match: {kind: layer, bits: 8}\n", 3, "'bits' belongs to the rule"),
    "an old field": (HEAD.replace("layer}", "layer, min_channels: 8}"), 3, "did you mean 'channels'?"),
    "a wrong kind": (HEAD.replace("layer", "layers"), 3, "kind must be 'channel-group', 'block' or 'layer', found"),
    "no kind": (HEAD.replace("{kind: layer}", "{name: conv1}"), 3, "rule 1: 'kind' is missing"),
    "no match": ("name: x\nrules:\n  - bits: 8\n", 3, "rule 1: 'match' is missing"),
    "no rules": ("name: x\nrules: []\n", 2, "the list is empty"),
    "no options": (HEAD.replace("8", "[]"), 4, "rule 1: bits: the list is empty and offers nothing"),
    "a bit-width that isn't one": (HEAD.replace("8", "[8, 3]"), 4, "bits must be of 2, 4, 8, 16, 32, found 3"),
    "words for numbers": (HEAD.replace("8", "eight"), 4, "found 'eight'"),
    "yes for a number": (HEAD.replace("8", "yes"), 4, "bits must be of 2, 4, 8, 16, 32, found True"),
    "a map for options": (HEAD.replace("8", "{a: 8}"), 4, "rule 1: bits must be"),
    "a wide width": (HEAD + "width: [1, 1.5]\n", 5, "width must be a fraction above 0, at most 1, found 1.5"),
    "a bare comparison": (HEAD.replace("layer}", "layer, parameters: many}"), 3, "'many' is no comparison"),
    "an unquoted comparison": ("name: x\nrules:\n  - match:\n      macs: >10000\n", 4, "comparisons need quotes"),
    "a kernel of a linear layer": (HEAD.replace("layer}", "layer, operator: linear, kernel: 3}"), 3, "has no kernel"),
    "a strange kernel": (HEAD.replace("layer}", "layer, kernel: 3by3}"), 3, "kernel must be a number or such as 3x3"),
    "rules as a map": ("name: x\nrules: {match: 1}\n", 2, "rules"),
    "a rule as text": ("name: x\nrules: [none]\n", 2, "rule 1"),
    "tabs": ("name: x\nrules:\n\t- match: 1\n", 3, "can't be read"),
    "itself": ("name: x\nrules: &r\n  - *r\n", 2, "an alias refers to what contains it"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_error_names_the_line_and_the_way_out(tmp_path: Path, what: str) -> None:
    text, line, message = WRONG[what]
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    assert f"{path}, line {line}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000, "name: 2024-13-45", "", "- 1\n--- 2", "\x00"])
def test_what_is_no_space_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


def test_a_rule_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: mine\nrules:\n  - match: {kind: layer}\n    bits: [8]\n\n  - match: {kind: block}\n    drop: true\n"
    )
    with pytest.raises(SpaceError, match=r"space mine: rule 2 \(line 6; kind: block\) matches nothing"):
        resolve(load_space(path), depthwise(), NATIVE)


def test_anchors_save_writing_lists_twice(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: x\nrules:\n  - match: {kind: channel-group, name: stem}\n    sparsity: &steps [0.25, 0.5]\n"
        "  - match: {kind: channel-group}\n    sparsity: *steps\n"
    )
    space = resolve(load_space(path), residual(), NATIVE)
    assert {d.options for d in space.decisions} == {(0.0, 0.25, 0.5)}


def test_a_rule_made_in_python_has_no_line() -> None:
    file = SpaceFile.model_validate({"name": "x", "rules": [{"match": {"kind": "layer"}, "bits": [8]}]})
    assert file.named(0) == "rule 1 (kind: layer)"


def test_a_space_that_offers_nothing_says_why() -> None:
    bits = {"conv": (32,), "linear": (32,)}
    nothing = made(residual(), {"match": {"kind": "layer", "operator": "conv"}, "bits": [8]}, bits=bits)
    with pytest.raises(SpaceError, match=r"space test offers nothing .*6 conv layers: 8 bits not offered"):
        nothing.require_effect()
    with pytest.raises(SpaceError, match=r"leave everything as it is"):
        made(residual(), {"match": {"kind": "layer"}, "bits": 32}).require_effect()
    for rule in ({"match": {"kind": "layer"}, "bits": 8}, {"match": GROUP, "sparsity": [0.5]}):
        made(residual(), rule).require_effect()
    made(residual(), {"match": {"kind": "block"}, "drop": False}, width=0.5).require_effect()
