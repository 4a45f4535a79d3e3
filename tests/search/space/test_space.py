from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from automl_compress import data_files
from automl_compress.core.graph import Graph
from automl_compress.core.plan import Plan
from automl_compress.errors import PlanError, SpaceError
from automl_compress.search.space.rules import SpaceFile, load_space
from automl_compress.search.space.space import SearchSpace, offered_bits, resolve
from automl_compress.techniques.quantization.formats import DEFAULT_EXECUTIONS, Executions
from tests.search.networks import NATIVE, concatenated, residual, space_of, table_for


def made(graph: Graph, *rules: dict[str, Any], bits: dict[str, tuple[int, ...]] = NATIVE, **more: Any) -> SearchSpace:
    return resolve(SpaceFile.model_validate({"name": "test", "rules": rules, **more}), graph, bits)


def test_the_first_rule_that_matches_decides() -> None:
    space = made(
        residual(),
        {"match": {"kind": "layer", "name": "b0.*"}, "bits": 32},
        {"match": {"kind": "layer", "operator": "conv"}, "bits": [8]},
    )
    offered = {d.target for d in space.decisions if d.kind == "bits"}
    assert offered == {"stem", "widen", "b1.conv1", "b1.conv2"}
    assert space.decision["bits.stem"].options == (32, 8)
    assert space.fixed["bits.b0.conv1"] == 32
    assert space.options("bits.head") == ()


def test_conditions_must_all_hold() -> None:
    space = made(
        residual(size=8, stem=4),
        {"match": {"kind": "channel-group", "channels": ">=8", "regex": r"b\d\.conv1"}, "sparsity": [0.5]},
    )
    assert [d.name for d in space.decisions] == ["sparsity.b0.conv1", "sparsity.b1.conv1"]


@pytest.mark.parametrize("name", ["layer9.*", "B0.*"])
def test_a_rule_that_matches_nothing_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(SpaceError, match=r"rule 1 .*matches nothing; the network's layers: stem, widen"):
        made(residual(), {"match": {"kind": "layer", "name": name}, "bits": [8]})


def test_a_rule_behind_others_that_take_all_of_its_targets_is_an_error() -> None:
    with pytest.raises(SpaceError, match=r"rule 2 .*never decides"):
        made(
            residual(),
            {"match": {"kind": "layer"}, "bits": [8]},
            {"match": {"kind": "layer", "name": "head"}, "bits": 32},
        )


def test_bits_that_the_device_lacks_are_not_offered_and_noted() -> None:
    space = made(residual(), {"match": {"kind": "layer"}, "bits": [4, 8, 32]}, bits={"conv": (8, 32), "linear": (32,)})
    assert space.decision["bits.stem"].options == (32, 8)
    assert space.fixed["bits.head"] == 32
    assert space.notes == (
        "6 conv layers: 4 bits not offered, the device has 8, 32 for conv",
        "1 linear layer: 4 bits not offered, the device has 32 for linear",
        "1 linear layer: 8 bits not offered, the device has 32 for linear",
    )
    with pytest.raises(SpaceError, match=r"stem can't be fixed to 4 bits"):
        made(residual(), {"match": {"kind": "layer"}, "bits": 4})


def test_a_transposed_convolution_is_offered_what_it_has_a_form_for() -> None:
    graph = residual()
    layers = tuple(replace(x, in_axis=0, out_axis=1) if x.name == "widen" else x for x in graph.layers)
    graph = replace(graph, layers=layers)
    assert [layer.name for layer in graph.layers if layer.transposed] == ["widen"]
    rule = {"match": {"kind": "layer", "operator": "conv"}, "bits": [8, 16]}
    offered, held = offered_bits(DEFAULT_EXECUTIONS, size_limited=True)
    resolved = resolve(SpaceFile.model_validate({"name": "test", "rules": [rule]}), graph, offered, held)
    assert resolved.options("bits.widen") == (32, 16)
    assert resolved.options("bits.stem") == (32, 16, 8)
    assert resolved.notes == ("1 conv layer: 8 bits not offered, the device has 16, 32 for transposed conv",)


def test_sparsities_that_leave_as_many_channels_are_offered_once() -> None:
    steps = [i / 8 for i in range(8)]
    space = made(residual(stem=4), {"match": {"kind": "channel-group", "name": "stem"}, "sparsity": steps})
    options = space.decision["sparsity.stem"].options
    kept = [Plan(sparsity={"stem": float(o)}).kept_count("stem", 4) for o in options]
    assert kept == [4, 3, 2, 1]
    assert options[0] == 0


def test_doing_nothing_is_always_offered_unless_one_value_is_given() -> None:
    graph = residual()
    free = made(
        graph, {"match": {"kind": "channel-group"}, "sparsity": [0.5]}, {"match": {"kind": "block"}, "drop": True}
    )
    assert free.plan({}).key == Plan().key
    forced = made(graph, {"match": {"kind": "channel-group"}, "sparsity": 0.5}, width=0.5)
    assert not forced.decisions
    assert forced.plan({}).sparsity == {"stem": 0.5, "b0.conv1": 0.5, "b1.conv1": 0.5}
    assert forced.plan({}).width == 0.5


def test_parameters_and_plans_round_trip() -> None:
    graph = residual()
    space = space_of(graph)
    rng = np.random.default_rng(0)
    for _ in range(50):
        params = {d.name: d.options[int(rng.integers(len(d.options)))] for d in space.decisions}
        plan = space.plan(params)
        plan.check(graph)
        assert space.plan(space.params(plan)).key == plan.key
        assert space.params(plan) == params


def test_a_sparsity_that_was_merged_away_is_still_understood() -> None:
    space = made(residual(stem=4), {"match": {"kind": "channel-group", "name": "stem"}, "sparsity": [0.45, 0.5]})
    assert space.params(Plan(sparsity={"stem": 0.5})) == {"sparsity.stem": 0.45}


@pytest.mark.parametrize(
    "plan", [Plan(width=0.3), Plan(sparsity={"stem": 0.9}), Plan(bits={"head": 4}), Plan(sparsity={"b0.conv1": 0.11})]
)
def test_a_plan_outside_of_the_space_is_an_error(plan: Plan) -> None:
    graph = residual(size=32, stem=32)
    with pytest.raises(PlanError, match="space test"):
        space_of(graph, sparsity=[0.5]).params(plan)


def test_plans_that_make_the_same_network_have_one_identity() -> None:
    space = space_of(residual())
    dropped = {"drop.b0": True}
    same = {**dropped, "sparsity.b0.conv1": 0.5, "bits.b0.conv1": 8}
    assert space.plan_key(space.plan(dropped)) == space.plan_key(space.plan(same))
    halved = space.plan({"width": 0.5})
    groups = {f"sparsity.{g.name}": 0.5 for g in residual().groups}
    assert space.plan_key(halved) == space.plan_key(space.plan(groups))
    assert space.plan_key(halved) != space.plan_key(space.plan({}))


def test_distributions_hold_every_decision_with_its_options() -> None:
    space = space_of(residual())
    assert {n: d.choices for n, d in space.distributions().items()} == {d.name: d.options for d in space.decisions}
    assert all(len(d.options) > 1 for d in space.decisions)


def test_fingerprints_tell_spaces_apart() -> None:
    graph = residual()
    one, other = space_of(graph), space_of(graph, sparsity=[0.5])
    assert one.fingerprint == space_of(residual()).fingerprint
    assert len({one.fingerprint, other.fingerprint, space_of(residual(blocks=1)).fingerprint}) == 3


PRESETS = {
    "cnn": {"width", "sparsity", "drop", "bits"},
    "transformer": {"width", "sparsity", "drop", "bits"},
    "prune-only": {"width", "sparsity", "drop"},
    "quantize-only": {"bits"},
    "distil-only": {"width", "drop"},
    "size-first": {"width", "sparsity", "drop", "bits"},
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("graph", [residual(), concatenated()])
def test_the_presets_fit_any_network(name: str, graph: Graph) -> None:
    space = resolve(load_space(name), graph, NATIVE)
    assert name in data_files.names("search_spaces")
    possible = PRESETS[name] - (set() if graph.blocks else {"drop"})
    assert {d.kind for d in space.decisions} == possible
    assert space.plan({}).key == Plan().key


def test_every_preset_is_tested() -> None:
    assert set(data_files.names("search_spaces")) == set(PRESETS)


BROKEN = {
    "an unknown field": ({"name": "x", "rules": [{"match": {"kind": "layer"}, "bit": 8}]}, "did you mean 'bits'"),
    "nothing given": ({"name": "x", "rules": [{"match": {"kind": "layer"}}]}, "gives 'bits'"),
    "the wrong thing": ({"name": "x", "rules": [{"match": {"kind": "layer"}, "drop": True}]}, "gives 'bits'"),
    "no rules": ({"name": "x", "rules": []}, "rules"),
    "a sparsity of one": ({"name": "x", "rules": [{"match": {"kind": "channel-group"}, "sparsity": [1]}]}, "below 1"),
    "a width of zero": ({"name": "x", "width": 0, "rules": [{"match": {"kind": "layer"}, "bits": 8}]}, "width"),
    "a bad regex": ({"name": "x", "rules": [{"match": {"kind": "layer", "regex": "("}, "bits": 8}]}, "can't be read"),
    "channels": ({"name": "x", "rules": [{"match": {"kind": "block", "channels": 2}, "drop": True}]}, "no number"),
    "optional": ({"name": "x", "rules": [{"match": {"kind": "layer"}, "bits": 8, "optional": True}]}, "'optional'"),
    "a list": ([1, 2], "must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    data, message = BROKEN[what]
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(SpaceError, match=message) as caught:
        load_space(path)
    assert "\n" not in str(caught.value)


def test_yaml_that_names_python_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(SpaceError, match="can't be read"):
        load_space(path)


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(SpaceError, match=r"no search space 'cmn': .*cnn"):
        load_space("cmn")


def test_the_example_in_the_readme_is_a_space() -> None:
    readme = next(p for p in data_files.folders("search_spaces") if (p / "README.md").is_file()) / "README.md"
    text = readme.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    assert SpaceFile.model_validate(yaml.safe_load(text)).rules[3].match.regex == r"layer[12]\..*"


def test_tables_cover_the_space() -> None:
    graph = residual()
    table = table_for(space_of(graph), graph)
    assert table.plan_cost(graph, Plan()).latency_us > table.plan_cost(graph, Plan(width=0.5)).latency_us


def test_bits_that_only_save_bytes_are_offered_where_size_is_limited() -> None:
    executions: Executions = {
        ("conv", 4): "emulated",
        ("conv", 8): "native",
        ("conv", 16): "storage",
        ("conv", 3): "emulated",
        ("linear", 2): "weight-only",
        ("linear", 16): "storage",
    }
    offered, held = offered_bits(executions, size_limited=False)
    assert offered == {"conv": (8, 32), "transposed conv": (32,), "linear": (2, 32)}
    assert held == {"conv": (4, 16), "transposed conv": (16,), "linear": (16,)}
    limited = {"conv": (4, 8, 16, 32), "transposed conv": (16, 32), "linear": (2, 16, 32)}
    assert offered_bits(executions, size_limited=True)[0] == limited
    rule = {"match": {"kind": "layer"}, "bits": [2, 4, 8]}
    space = resolve(SpaceFile.model_validate({"name": "test", "rules": [rule]}), residual(), offered, held)
    assert space.decision["bits.stem"].options == (32, 8)
    assert space.decision["bits.head"].options == (32, 2)
    assert any("4 bits not offered, they make the file smaller but nothing faster" in note for note in space.notes)
    fixed = {"match": {"kind": "layer", "operator": "conv"}, "bits": 4}
    space = resolve(SpaceFile.model_validate({"name": "test", "rules": [fixed]}), residual(), offered, held)
    assert space.fixed["bits.stem"] == 4
