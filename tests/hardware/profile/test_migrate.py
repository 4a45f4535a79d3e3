from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from automl_compress.errors import ProfileError
from automl_compress.hardware.profile.files import append, replace_file
from automl_compress.hardware.profile.profile import DeviceProfile, load_profile
from automl_compress.hardware.profile.schema import KernelRecord
from tests.hardware.older import as_version_1
from tests.hardware.simulated import FACTS

KERNEL = KernelRecord(key="Conv|float[1,3]>float[1,4]", mean_us=12.5, spread=0.01, bursts_us=(12.0, 13.0))


@pytest.fixture
def old(profile: DeviceProfile) -> Path:
    """A file of version 1 with one measurement, and a comment of the user's."""
    profile.add_kernels([KERNEL])
    text = as_version_1(profile.path.read_text()).replace("  bursts: 15\n", "  bursts: 15  # mine\n")
    profile.path.write_text(text)
    return profile.path


def test_a_file_of_version_1_reads_as_what_it_is_today(old: Path) -> None:
    before = old.read_bytes()
    profile = DeviceProfile(old, FACTS)
    assert (profile.version, profile.header.version) == (1, 2)
    assert (profile.provenance, profile.header.memory.model) == ("measured", "process")
    assert profile.kernels[KERNEL.key] == KERNEL
    assert not profile.warnings
    profile.refresh()
    assert old.read_bytes() == before


@pytest.mark.parametrize(
    ("written", "today"),
    [
        ("|block_size=0 output_dtype=0 precision=0", ""),
        ("|block_size=0", ""),
        ("|block_size=64 output_dtype=0", "|block_size=64"),
        ("|k2x2 s1x1 p0 g1|block_size=0|relu", "|k2x2 s1x1 p0 g1|relu"),
        ("|block_size=0 output_dtype=10", "|output_dtype=10"),
    ],
)
def test_kernels_that_differ_in_defaults_of_later_opsets_are_the_same(
    profile: DeviceProfile, written: str, today: str
) -> None:
    key = "DequantizeLinear|uint8[1,3]>float[1,3]"
    profile.add_kernels([replace(KERNEL, key=key + written), replace(KERNEL, key=key + today, mean_us=13.5)])
    again = DeviceProfile(profile.path, FACTS)
    assert list(again.kernels) == [key + today]
    assert again.kernels[key + today].mean_us == 13.0


def test_the_first_append_rewrites_it_and_keeps_the_original(old: Path) -> None:
    before = old.read_bytes()
    profile = DeviceProfile(old, FACTS)
    profile.add_kernels([replace(KERNEL, key="Relu")])
    assert old.with_name(old.name + ".v1.bak").read_bytes() == before
    data = yaml.safe_load(old.read_text())
    assert (data["version"], data["provenance"]) == (2, "measured")
    assert "  bursts: 15  # mine\n" in old.read_text()
    again = DeviceProfile(old, FACTS)
    assert again.version == 2
    assert again.kernels == profile.kernels
    assert set(again.kernels) == {KERNEL.key, "Relu"}


def test_whoever_has_it_open_meanwhile_loses_nothing(old: Path) -> None:
    first, second = DeviceProfile(old, FACTS), DeviceProfile(old, FACTS)
    first.add_kernels([replace(KERNEL, key="a")])
    second.add_kernels([replace(KERNEL, key="b")])
    first.refresh()
    assert set(first.kernels) == set(DeviceProfile(old, FACTS).kernels) == {KERNEL.key, "a", "b"}


def test_upgrading_is_done_once_and_on_any_machine(old: Path) -> None:
    profile = DeviceProfile(old, replace(FACTS, cpu="Other"))
    assert profile.upgrade() == old.with_name(old.name + ".v1.bak")
    text = old.read_text()
    assert profile.upgrade() is None
    assert old.read_text() == text


def test_an_older_header_is_checked_as_strictly(old: Path) -> None:
    old.write_text(old.read_text().replace("  threads: 1", "  threads: many"))
    with pytest.raises(ProfileError, match=r"runtime\.threads"):
        DeviceProfile(old, FACTS)


def test_a_version_that_cannot_be_found_as_text_names_the_way_out(old: Path) -> None:
    old.write_text(old.read_text().replace("version: 1", '"version": 1'))
    with pytest.raises(ProfileError, match="no line begins with 'version:'"):
        DeviceProfile(old, FACTS)


LIMITED = """
import resource, sys
from pathlib import Path
from automl_compress.errors import CompressError
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord
from tests.hardware.simulated import FACTS

path = Path(sys.argv[1])
profile = DeviceProfile(path, FACTS)
known = set(profile.kernels)
size = path.stat().st_size + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    profile.add_kernels([KernelRecord(key=f"k{i}", mean_us=1.0, spread=0.0) for i in range(50)])
except CompressError as error:
    assert set(profile.kernels) == known
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes can't be limited here")
@pytest.mark.parametrize("room", [0, 30, 400])
@pytest.mark.parametrize("version", [1, 2])
def test_a_disk_that_fills_while_appending_costs_nothing_that_was_there(old: Path, version: int, room: int) -> None:
    if version == 2:
        DeviceProfile(old, FACTS).upgrade()
    before = old.read_bytes()
    done = subprocess.run([sys.executable, "-c", LIMITED, str(old), str(room)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [said] = done.stdout.splitlines()
    assert str(old) in said
    assert "free some space and run the same again" in said
    if version == 2:
        assert old.read_bytes() == before
    again = DeviceProfile(old, FACTS)
    assert set(again.kernels) == {KERNEL.key}
    assert not again.notes
    again.add_kernels([replace(KERNEL, key="later")])
    assert set(DeviceProfile(old, FACTS).kernels) == {KERNEL.key, "later"}


def test_a_file_that_cannot_be_written_is_one_line_that_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"can't be written \(.*\); set AUTOML_COMPRESS_HOME"):
        append(tmp_path, 0, b"x")
    with pytest.raises(ProfileError, match=r"can't be written, there is no folder .*missing; make it"):
        replace_file(tmp_path / "missing" / "file", b"x")


def test_a_profile_in_a_folder_that_cannot_be_written_is_read_all_the_same(
    profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    DeviceProfile(profile.path, FACTS).add_kernels([KERNEL])
    monkeypatch.setattr("automl_compress.hardware.profile.profile.os.access", lambda *_: False)
    profile.path.with_name(profile.path.name + ".lock").unlink(missing_ok=True)
    again = DeviceProfile(profile.path, FACTS)
    again.refresh()
    assert set(again.kernels) == {KERNEL.key}
    assert not profile.path.with_name(profile.path.name + ".lock").exists()


def test_lines_that_were_deleted_by_hand_meanwhile_are_noticed(profile: DeviceProfile) -> None:
    profile.add_kernels([KERNEL, replace(KERNEL, key="Relu")])
    text = profile.path.read_text()
    profile.path.write_text(text[: text.index('- {"kernel": "Relu')])
    profile.add_kernels([replace(KERNEL, key="x")])
    assert set(profile.kernels) == set(DeviceProfile(profile.path, FACTS).kernels) == {KERNEL.key, "x"}


def test_a_shipped_profile_of_this_machine_is_copied_and_used(
    profile: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.add_kernels([KERNEL])
    shipped = tmp_path / "shipped" / "imaginary.yaml"
    shipped.parent.mkdir()
    shipped.write_bytes(profile.path.read_bytes())
    monkeypatch.setattr("automl_compress.data_files.folders", lambda _: (shipped.parent,))
    before = shipped.read_bytes()
    here = load_profile("imaginary", home=tmp_path / "home", facts=FACTS)
    here.add_kernels([replace(KERNEL, key="Relu")])
    again = load_profile("imaginary", home=tmp_path / "home", facts=FACTS)
    assert set(again.kernels) == {KERNEL.key, "Relu"}
    assert shipped.read_bytes() == before
    elsewhere = load_profile("imaginary", home=tmp_path / "home", facts=replace(FACTS, cpu="Other"))
    assert elsewhere.path == shipped
    assert "the one at hand has Other" in elsewhere.warnings[0]
