"""Listing, judging, comparing and merging profiles: the values, and the commands that print them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from automl_compress.cli import main
from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.catalog import entries, find
from automl_compress.hardware.profile.insight import difference, overview, untrusted, warnings
from automl_compress.hardware.profile.merge import merge
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from automl_compress.hardware.profile.schema import CorrectionRecord, KernelRecord, ModelRecord
from tests.hardware.older import as_version_1
from tests.hardware.simulated import FACTS

SHARED = KernelRecord(key="Conv|a", mean_us=100.0, spread=0.01, bursts_us=(99.0, 101.0))
NOISY = KernelRecord(key="Conv|b", mean_us=50.0, spread=0.3)
QUICK = KernelRecord(key="Relu", mean_us=1.5, spread=0.5)
MODEL = ModelRecord(
    key="m",
    family="m",
    kernel_sum_us=150,
    nodes=3,
    measured_us=160,
    spread=0.01,
    size_bytes=9,
    activation_bytes=4,
    memory_bytes=70,
)

Make = Callable[..., DeviceProfile]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes profiles of the imaginary machine (or a variation of it), each in a folder of its own."""
    monkeypatch.setenv("AUTOML_COMPRESS_HOME", str(tmp_path / "home"))

    def make(where: str, *kernels: KernelRecord, threads: int = 1, **other: object) -> DeviceProfile:
        facts = replace(FACTS, **other)  # type: ignore[arg-type]
        profile = load_profile("local", home=tmp_path / where, threads=threads, facts=facts)
        profile.add_kernels(kernels)
        return profile

    return make


def test_shipped_measured_and_damaged_profiles_are_listed(make: Make, tmp_path: Path) -> None:
    profile = make("home", SHARED, NOISY)
    profile.add_models([MODEL])
    damaged = profile.path.with_name("damaged.yaml")
    damaged.write_text("schema: [")
    found = {entry.file.stem: entry for entry in entries(home=tmp_path / "home", facts=FACTS)}
    assert found["local"].kind == "template"
    assert found["local"].origin == "shipped"
    mine = found[profile.path.stem].to_json()
    assert (mine["kind"], mine["origin"], mine["matches"]) == ("measured", "measured here", True)
    assert (mine["kernels"], mine["models"], mine["threads"], mine["device"]) == (2, 1, 1, FACTS.cpu)
    assert found["damaged"].kind == "damaged"
    assert "not YAML" in str(found["damaged"].problem)
    [other] = [e for e in entries(home=tmp_path / "home", facts=replace(FACTS, cpu="x")) if e.file == profile.path]
    assert not other.to_json()["matches"]


def test_a_template_means_what_was_measured_for_it_here(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="nothing was measured for it on this machine yet"):
        find("local", home=tmp_path / "home", facts=FACTS)
    profile = make("home", SHARED)
    for name in ("local", profile.path.stem, str(profile.path)):
        assert find(name, home=tmp_path / "home", facts=FACTS).kernels == profile.kernels
        assert load_profile(name, home=tmp_path / "home", facts=FACTS).path == profile.path
    with pytest.raises(ProfileError, match="'nonsense'"):
        find("nonsense", home=tmp_path / "home", facts=FACTS)


def test_what_cannot_be_trusted_is_said(make: Make) -> None:
    profile = make("home", SHARED)
    assert warnings(profile) == []
    profile.add_kernels([NOISY, QUICK, replace(SHARED, key="Conv|c", conditions="heat; quota")])
    profile.add_corrections([CorrectionRecord(key="m", records=9, error=0.2)])
    assert [kernel.key for kernel in untrusted(profile)] == [NOISY.key]
    noisy, heat, quota, fit = warnings(profile)
    assert "1 of 4 kernels" in noisy
    assert NOISY.key in noisy
    assert heat == "1 of 4 kernels were measured under: heat"
    assert quota == "1 of 4 kernels were measured under: quota"
    assert "20.0% wrong" in fit
    told = overview(profile)
    assert [kernel["kernel"] for kernel in told["slowest"]] == [SHARED.key, "Conv|c", NOISY.key, QUICK.key]
    assert told["provenance"] == {"measured": 4}


def test_a_difference_is_a_ratio_and_those_that_leave_it(make: Make) -> None:
    first = make("a", *(replace(SHARED, key=f"k{i}") for i in range(9)), NOISY)
    second = make("b", *(replace(SHARED, key=f"k{i}", mean_us=110.0 if i else 200.0) for i in range(9)), threads=2)
    found = difference(first, second)
    assert found["header"] == {"runtime.threads": [1, 2]}
    assert found["kernels"]["ratio"]["median"] == pytest.approx(1.1)
    assert found["kernels"]["outliers"] == [{"key": "k0", "first_us": 100.0, "second_us": 200.0}]
    assert [found["kernels"][name] for name in ("common", "only_first", "only_second")] == [9, 1, 0]
    assert found["models"]["ratio"] is None


def test_a_profile_does_not_differ_from_itself(make: Make) -> None:
    profile = make("a", SHARED, NOISY)
    found = difference(profile, profile)
    assert found["header"] == {}
    assert found["kernels"]["ratio"] == {"p5": 1.0, "median": 1.0, "p95": 1.0}


@pytest.mark.parametrize("compact", [False, True])
def test_merging_adds_up_what_was_measured_and_counts_what_is_shared_once(
    make: Make, tmp_path: Path, compact: bool
) -> None:
    first = make("a", SHARED, replace(SHARED, mean_us=104.0))
    second = make("b", SHARED, NOISY)
    second.add_models([MODEL])
    out = tmp_path / "out.yaml"
    assert merge([first, second], out, name="both", compact=compact) == []
    merged = DeviceProfile(out, FACTS)
    assert merged.name == "both"
    assert not merged.warnings
    assert set(merged.kernels) == {SHARED.key, NOISY.key}
    assert merged.kernels[SHARED.key].count == 2
    assert merged.kernels[SHARED.key].mean_us == pytest.approx(102.0)
    assert merged.kernels[SHARED.key].bursts_us == (*SHARED.bursts_us, *SHARED.bursts_us)
    assert merged.models == [MODEL]
    assert len(out.read_text().split("measurements:\n")[1].splitlines()) == (3 if compact else 4)


def test_merging_with_itself_changes_nothing(make: Make, tmp_path: Path) -> None:
    profile = make("a", SHARED, NOISY, SHARED)
    merge([profile, profile], tmp_path / "out.yaml")
    assert (tmp_path / "out.yaml").read_bytes() == profile.path.read_bytes()
    merge([profile], tmp_path / "compact.yaml", compact=True)
    assert DeviceProfile(tmp_path / "compact.yaml", FACTS).kernels == profile.kernels


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cpu": "Other"}, "match.cpu is Imaginary 9000 in .* and Other in"),
        ({"onnxruntime": "1.33.0"}, "runtime.version is 1.32.0 in .* and 1.33.0 in"),
        ({"threads": 2}, "runtime.threads is 1 in .* and 2 in"),
        ({"flags": ("sse",)}, "match.flags"),
    ],
)
def test_what_is_not_of_one_device_is_not_merged(
    make: Make, tmp_path: Path, other: dict[str, object], said: str
) -> None:
    with pytest.raises(ProfileError, match=said):
        merge([make("a", SHARED), make("b", SHARED, **other)], tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_what_need_not_agree_is_noted(make: Make, tmp_path: Path) -> None:
    [note] = merge([make("a", SHARED), make("b", NOISY, cores=8)], tmp_path / "out.yaml")
    assert note.startswith("match.cores is 4 in")


def test_nothing_is_overwritten(make: Make, tmp_path: Path) -> None:
    profile = make("a", SHARED)
    with pytest.raises(ProfileError, match="exists already"):
        merge([profile], profile.path)


def test_an_old_file_is_merged_in_the_new_format(make: Make, tmp_path: Path) -> None:
    first, second = make("a", SHARED), make("b", NOISY)
    first.path.write_text(as_version_1(first.path.read_text()))
    merge([DeviceProfile(first.path, FACTS), second], tmp_path / "out.yaml")
    merged = DeviceProfile(tmp_path / "out.yaml", FACTS)
    assert merged.version == 2
    assert set(merged.kernels) == {SHARED.key, NOISY.key}


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = main(["devices", *line])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands_print_text_and_json(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make("home", SHARED, NOISY), make("b", SHARED, replace(NOISY, mean_us=99.0))
    first.add_corrections([CorrectionRecord(key="any", coefficients={"kernel_sum_us": 1.02}, records=9, error=0.01)])
    a, b, out = str(first.path), str(second.path), str(tmp_path / "out.yaml")
    expected = {
        ("list",): [first.path.stem, "template"],
        ("show", a): ["Imaginary 9000", "kernel_sum_us 1.02", "median 1.0%", "not to be trusted", NOISY.key],
        ("show", "cortex-m7-400mhz"): ["estimated", "8 bits 0.8 Gop/s", "source", "conv 55%"],
        ("check", a): ["good", "warning", "the one at hand has"],
        ("diff", a, b): ["2 in both", "second / first"],
    }
    for line, words in expected.items():
        code, text, errors = run(capsys, *line)
        assert (code, errors) == (0, "")
        assert all(word in text for word in words), text
        code, text, errors = run(capsys, *line, "--json")
        assert (code, errors) == (0, "")
        json.loads(text)
    assert run(capsys, "merge", a, b, "-o", out, "--name", "both")[0] == 0
    assert DeviceProfile(Path(out), FACTS).name == "both"
    code, text, errors = run(capsys, "merge", a, b, "-o", out)
    assert (code, text) == (2, "")
    assert "exists already" in errors


def test_check_says_of_each_file_whether_it_is_good(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make("a", SHARED)
    bad = profile.path.with_name("bad.yaml")
    bad.write_text(profile.path.read_text() + '- {"kernel": "x", "mean_us": -1, "spread": 0}\n')
    code, text, _ = run(capsys, "check", str(profile.path), str(bad), "local", "nowhere")
    assert code == 2
    assert f"{profile.path}: good" in text
    assert text.count(str(bad)) == 1
    assert "mean_us must not be negative, found -1" in text
    code, text, _ = run(capsys, "check", "--json", str(profile.path), str(bad), "local", "nowhere")
    assert [one["good"] for one in json.loads(text)] == [True, False, True, False]


def test_check_upgrades_on_request(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("a", SHARED).path
    path.write_text(as_version_1(path.read_text()))
    assert "--upgrade" in run(capsys, "check", str(path))[1]
    assert ".v1.bak" in run(capsys, "check", "--upgrade", str(path))[1]
    assert "version" not in run(capsys, "check", str(path))[1]
