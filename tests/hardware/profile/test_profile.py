from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from automl_compress import data_files
from automl_compress.errors import DeviceError, ProfileError
from automl_compress.hardware.profile.profile import MARK, DeviceProfile, load_profile
from automl_compress.hardware.profile.schema import (
    CorrectionRecord,
    KernelRecord,
    ModelRecord,
    read_record,
    write_record,
)
from tests.hardware.older import as_version_1
from tests.hardware.simulated import FACTS

KERNEL = KernelRecord(key="Conv|float[1,3]>float[1,4]", mean_us=12.5, spread=0.01, bursts_us=(12.0, 13.0))
MODEL = ModelRecord(
    key="abc",
    family="abc",
    kernel_sum_us=90.0,
    nodes=9,
    measured_us=100.0,
    spread=0.02,
    size_bytes=1000,
    activation_bytes=64,
)
CORRECTION = CorrectionRecord(
    key="abc",
    coefficients={"kernel_sum_us": 1.02, "nodes": -0.1},
    records=14,
    error=0.01,
    worst_error=0.03,
    p95_error=0.02,
)
reals = st.floats(min_value=0, max_value=1e9)


@given(st.text(min_size=1), reals, reals, st.lists(reals, max_size=4), st.integers(1, 99))
def test_a_kernel_survives_being_written_and_read(
    key: str, mean: float, spread: float, bursts: list[float], count: int
) -> None:
    record = KernelRecord(key=key, mean_us=mean, spread=spread, bursts_us=tuple(bursts), count=count)
    line = write_record(record)
    assert "\n" not in line
    assert read_record(line, "here") == record


def test_what_was_added_is_there_after_loading_again(profile: DeviceProfile) -> None:
    profile.add_kernels([KERNEL, replace(KERNEL, key="Relu")])
    profile.add_models([MODEL])
    again = DeviceProfile(profile.path, FACTS)
    assert again.kernels == profile.kernels
    assert set(again.kernels) == {KERNEL.key, "Relu"}
    assert again.models == profile.models == [MODEL]
    assert not again.warnings
    assert not again.notes


def test_a_later_correction_replaces_the_earlier(profile: DeviceProfile) -> None:
    profile.add_corrections([CORRECTION])
    profile.add_corrections([replace(CORRECTION, key="any"), replace(CORRECTION, records=20)])
    again = DeviceProfile(profile.path, FACTS)
    assert again.corrections == profile.corrections
    assert {family: found.records for family, found in again.corrections.items()} == {"abc": 20, "any": 14}


def test_conditions_of_measurements_are_kept_when_they_are_merged(profile: DeviceProfile) -> None:
    profile.add_kernels([replace(KERNEL, conditions="busy machine"), replace(KERNEL, conditions="throttled"), KERNEL])
    assert DeviceProfile(profile.path, FACTS).kernels[KERNEL.key].conditions == "busy machine; throttled"


def test_the_whole_file_is_yaml(profile: DeviceProfile) -> None:
    profile.add_kernels([KERNEL])
    data = yaml.safe_load(profile.path.read_text())
    assert data["measurements"] == [json.loads(write_record(KERNEL)[2:])]
    assert data["match"]["cpu"] == FACTS.cpu
    assert data["runtime"]["version"] == FACTS.onnxruntime


def test_the_file_only_ever_grows(profile: DeviceProfile) -> None:
    before = profile.path.read_text()
    profile.add_kernels([KERNEL])
    middle = profile.path.read_text()
    profile.add_models([MODEL])
    assert middle.startswith(before)
    assert profile.path.read_text().startswith(middle)


def test_equal_kernels_are_averaged_by_how_often_they_were_seen(profile: DeviceProfile) -> None:
    profile.add_kernels([replace(KERNEL, mean_us=10.0, count=3)])
    profile.add_kernels([replace(KERNEL, mean_us=20.0)])
    assert profile.kernels[KERNEL.key].mean_us == pytest.approx(12.5)
    assert profile.kernels[KERNEL.key].count == 4


def test_a_later_model_replaces_the_earlier(profile: DeviceProfile) -> None:
    profile.add_models([MODEL])
    profile.add_models([replace(MODEL, memory_bytes=5)])
    assert [m.memory_bytes for m in profile.models] == [5]


def test_loading_twice_finds_the_same_file(tmp_path: Path) -> None:
    first = load_profile("local", home=tmp_path, facts=FACTS)
    first.add_kernels([KERNEL])
    again = load_profile("local", home=tmp_path, facts=FACTS)
    assert again.path == first.path
    assert set(again.kernels) == {KERNEL.key}


@pytest.mark.parametrize(
    "other",
    [{"cpu": "Other"}, {"onnxruntime": "1.33.0"}, {"flags": ("avx2",)}, {"architecture": "arm64"}],
)
def test_another_machine_or_runtime_gets_another_file_and_a_warning_for_this_one(
    tmp_path: Path, other: dict[str, object]
) -> None:
    facts = replace(FACTS, **other)  # type: ignore[arg-type]
    first = load_profile("local", home=tmp_path, facts=FACTS)
    assert load_profile("local", home=tmp_path, facts=facts).path != first.path
    foreign = load_profile(str(first.path), facts=facts)
    assert len(foreign.warnings) == 1
    assert "the one at hand has" in foreign.warnings[0]
    with pytest.raises(ProfileError, match="--profile local"):
        foreign.add_kernels([KERNEL])


def test_what_need_not_agree_is_a_warning_only(tmp_path: Path) -> None:
    first = load_profile("local", home=tmp_path, facts=FACTS)
    again = load_profile("local", home=tmp_path, facts=replace(FACTS, cores=8))
    assert again.path == first.path
    assert again.warnings == ["profile local: measured with number of cores 4, the one at hand has 8"]
    again.add_kernels([KERNEL])
    assert set(again.kernels) == {KERNEL.key}


def test_a_system_update_keeps_the_file(tmp_path: Path) -> None:
    first = load_profile("local", home=tmp_path, facts=FACTS)
    assert load_profile("local", home=tmp_path, facts=replace(FACTS, system="Linux 2")).path == first.path


def test_threads_are_part_of_the_profile(tmp_path: Path) -> None:
    two = load_profile("local", home=tmp_path, threads=2, facts=FACTS)
    assert two.threads == 2
    assert two.header.settings()["threads"] == 2
    assert two.path != load_profile("local", home=tmp_path, facts=FACTS).path
    with pytest.raises(ProfileError, match="2 threads, not 1"):
        load_profile(str(two.path), threads=1, facts=FACTS)


def test_what_runs_natively(profile: DeviceProfile) -> None:
    assert profile.bit_widths("conv") == (8, 32)
    assert profile.bit_widths("linear") == (8, 32)
    assert profile.bit_widths("attention") == (32,)


@pytest.mark.parametrize(("flags", "alignment"), [(("avx2", "fma"), 8), (("avx2", "avx512f"), 16), (("asimd",), None)])
def test_the_layouts_block_follows_the_instruction_sets(
    tmp_path: Path, flags: tuple[str, ...], alignment: int | None
) -> None:
    profile = load_profile("local", home=tmp_path, facts=replace(FACTS, flags=flags, memory_bytes=10**9))
    assert profile.alignment("conv", 32) == alignment
    assert profile.alignment("conv", 8) is None
    assert profile.header.device.memory_bytes == 10**9


def test_unknown_names_list_what_is_known() -> None:
    with pytest.raises(ProfileError, match=r"'nonsense': name one of .*local"):
        load_profile("nonsense", facts=FACTS)


def test_without_a_runtime_nothing_can_be_measured(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        load_profile("local", home=tmp_path, facts=replace(FACTS, onnxruntime="none"))


def test_shipped_profiles_are_found_by_name() -> None:
    assert "local" in data_files.names("hardware_profiles")
    found = data_files.find("hardware_profiles", "local")
    assert found is not None
    assert found.is_file()
    assert data_files.find("hardware_profiles", "../local") is None


def test_a_folder_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="AUTOML_COMPRESS_HOME"):
        load_profile("local", home=tmp_path / "file", facts=FACTS)


def edit(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


def append(line: str) -> Callable[[str], str]:
    return lambda text: text + line + "\n"


def kernel(fields: str) -> Callable[[str], str]:
    return append('- {"kernel": "a", ' + fields + "}")


def correction(fields: str) -> Callable[[str], str]:
    return append('- {"correction": "a", ' + fields + "}")


DAMAGES = {
    "foreign schema": (edit("automl-compress/profile", "other/thing"), "schema is 'other/thing'"),
    "newer version": (edit("version: 2\n", "version: 3\n"), "newer than this program"),
    "older version": (edit("version: 2\n", "version: 0\n"), "version"),
    "unknown field": (edit("  threads: 1", "  threads: 1\n  speed: 9"), "runtime.speed: unknown field"),
    "missing field": (edit("  bursts: 15\n", ""), "protocol.bursts: it is missing"),
    "wrong type": (edit("  threads: 1", "  threads: many"), "runtime.threads"),
    "truth for a number": (edit("  threads: 1", "  threads: true"), "runtime.threads"),
    "no discard": (edit("discard: 0.34", "discard: 1.5"), "protocol.discard"),
    "endless bursts": (edit("burst_seconds: 1.0", "burst_seconds: .inf"), "protocol.burst_seconds"),
    "null fact": (edit(f'cpu: "{FACTS.cpu}"', "cpu: null"), "match.cpu is null"),
    "twice in the header": (
        edit("  threads: 1", "  threads: 1\n  threads: 2"),
        "'threads' is given twice",
    ),
    "unknown fact": (edit("must_agree: [", "must_agree: [colour, "), "match.must_agree"),
    "estimated from nothing": (edit("provenance: measured", "provenance: estimated"), "roofline is missing"),
    "alignment of nothing": (edit("[QLinearConv]}", "[QLinearConv], alignment: 0}"), "conv.2.alignment"),
    "a list as key": (edit("name: local", "name: local\n? [a, b]\n: 1"), "not YAML|unhashable"),
    "an impossible date": (edit("name: local", "name: 2026-99-99"), "not YAML|name"),
    "nested too deeply": (edit("name: local", "name: " + "[" * 5000), "not YAML"),
    "windows": (lambda text: text.replace("\n", "\r\n"), "CR LF"),
    "huge time": (kernel('"mean_us": 1e999, "spread": 0'), "mean_us must be a finite number"),
    "huge whole time": (kernel(f'"mean_us": 1{"0" * 400}, "spread": 0'), "mean_us must be a finite number"),
    "huge count": (kernel(f'"mean_us": 1, "spread": 0, "count": 1{"0" * 30}'), "count "),
    "endless digits": (kernel(f'"mean_us": 1{"0" * 5000}, "spread": 0'), "can't be read"),
    "nested line": (append("- " + "[" * 20000), "can't be read"),
    "not yaml": (edit("schema: automl", "schema: [automl"), "line .*not YAML"),
    "python object": (edit("name: local", "name: !!python/object:os.system local"), "not YAML"),
    "empty": (lambda text: "", "not a device profile"),
    "a list": (lambda text: "- 1\n- 2\n", "not a device profile"),
    "cut in the header": (lambda text: text[: text.index("protocol:") + 30], "protocol"),
    "cut before the mark": (lambda text: text[: text.index(MARK)], "cut off"),
    "cut in the mark": (lambda text: text[: text.index("measurements:") + 5], "cut off|expected"),
    "not json": (append("- {kernel: }"), "line [0-9]+: the line can't be read"),
    "no dash": (append("kernel"), "line [0-9]+: a measurement line begins with"),
    "neither kernel nor model": (append('- {"thing": 1}'), "line [0-9]+: .*'kernel', 'model', 'correction'"),
    "negative time": (
        kernel('"mean_us": -1, "spread": 0'),
        "mean_us must not be negative, found -1",
    ),
    "no unit": (
        kernel('"mean": 1, "spread": 0'),
        "'mean' .*unit is missing, write 'mean_us', found 1",
    ),
    "twice": (
        kernel('"mean_us": 1, "mean_us": 2, "spread": 0'),
        "'mean_us' is given twice",
    ),
    "a truth": (
        kernel('"mean_us": true, "spread": 0'),
        "mean_us must be a finite number, found True",
    ),
    "count in words": (
        kernel('"mean_us": 1, "spread": 0, "count": "2"'),
        "count must be a whole number",
    ),
    "correction without records": (append('- {"correction": "a"}'), "field 'records' is missing"),
    "nan in a correction": (
        correction('"records": 3, "coefficients": {"a": NaN}'),
        "coefficients.a must",
    ),
    "negative error": (correction('"records": 3, "error": -0.1'), "error must not be negative"),
    "no date": (correction('"records": 3, "date": "today"'), "date "),
    "nan": (kernel('"mean_us": NaN, "spread": 0'), "mean_us must be a finite number, found nan"),
    "text for a time": (kernel('"mean_us": "1", "spread": 0'), "mean_us must be a finite number"),
    "no time": (kernel('"spread": 0'), "field 'mean_us' is missing"),
    "foreign field": (kernel('"mean_us": 1, "spread": 0, "x": 1'), "unknown field 'x'"),
    "bad provenance": (kernel('"mean_us": 1, "spread": 0, "provenance": "guess"'), "provenance"),
    "bad burst": (kernel('"mean_us": 1, "spread": 0, "bursts_us": [-1]'), "bursts_us"),
    "broken in the middle": (lambda text: text.replace('"mean_us": 12.5', '"mean_us": ', 1), "line [0-9]+"),
    "zero nodes": (lambda text: text + write_record(replace(MODEL, nodes=0)) + "\n", "nodes must be greater than zero"),
    "half a node": (lambda text: text + write_record(MODEL).replace('"nodes": 9', '"nodes": 9.5') + "\n", "whole"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_profile_is_refused_in_one_line_that_names_the_file(profile: DeviceProfile, name: str) -> None:
    change, expected = DAMAGES[name]
    profile.add_kernels([KERNEL])
    profile.path.write_text(change(profile.path.read_text()))
    with pytest.raises(ProfileError, match=expected) as caught:
        DeviceProfile(profile.path, FACTS)
    assert str(profile.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(profile: DeviceProfile) -> None:
    profile.path.write_bytes(profile.path.read_bytes() + b"- \xff\xfe\n")
    with pytest.raises(ProfileError, match="UTF-8"):
        DeviceProfile(profile.path, FACTS)


@given(st.data())
def test_a_last_line_cut_by_a_kill_costs_that_line_only(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        profile = load_profile("local", home=Path(folder), facts=FACTS)
        profile.add_kernels([KERNEL])
        whole = profile.path.read_bytes()
        line = (write_record(replace(KERNEL, key="Gemm·é")) + "\n").encode()
        profile.path.write_bytes(whole + line[: data.draw(st.integers(1, len(line) - 1))])
        again = DeviceProfile(profile.path, FACTS)
        assert set(again.kernels) == {KERNEL.key}
        assert len(again.notes) == 1
        again.add_kernels([replace(KERNEL, key="Relu")])
        last = DeviceProfile(profile.path, FACTS)
        assert set(last.kernels) == {KERNEL.key, "Relu"}
        assert not last.notes


def test_another_machine_has_a_file_of_its_own_called_by_its_host(tmp_path: Path) -> None:
    here = load_profile("local", home=tmp_path, facts=FACTS)
    there = load_profile("local", home=tmp_path, facts=FACTS, host="10")
    assert here.path != there.path
    assert there.name == "10"
    assert there.path.name.startswith("10-imaginary-9000")
    assert load_profile("local", home=tmp_path, facts=FACTS, host="10").path == there.path


def test_what_another_process_appended_is_picked_up(profile: DeviceProfile) -> None:
    other = DeviceProfile(profile.path, FACTS)
    other.add_kernels([KERNEL])
    assert not profile.kernels
    profile.add_kernels([replace(KERNEL, key="Relu")])
    assert set(profile.kernels) == {KERNEL.key, "Relu"}
    other.refresh()
    assert other.kernels == profile.kernels


APPENDER = """
import sys
from pathlib import Path
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord
from tests.hardware.simulated import FACTS

profile = DeviceProfile(Path(sys.argv[1]), FACTS)
for i in range(25):
    profile.add_kernels([KernelRecord(key=key, mean_us=1.0, spread=0.0) for key in (f"{sys.argv[2]}{i}", "shared")])
"""


@pytest.mark.parametrize("version", [1, 2])
def test_two_processes_that_append_at_the_same_time_lose_nothing(profile: DeviceProfile, version: int) -> None:
    if version == 1:
        profile.path.write_text(as_version_1(profile.path.read_text()))
    workers = [subprocess.Popen([sys.executable, "-c", APPENDER, str(profile.path), who]) for who in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    again = DeviceProfile(profile.path, FACTS)
    assert set(again.kernels) == {f"{who}{i}" for who in "ab" for i in range(25)} | {"shared"}
    assert again.kernels["shared"].count == 50
