from __future__ import annotations

from automl_compress.hardware.measuring.machine import cpu_name, kernel_flags
from automl_compress.hardware.profile.host import host_facts

X86 = """processor\t: 0
model name\t: AMD EPYC
cpu family\t: 25
model\t\t: 17
flags\t\t: fpu avx2 fma sse3

processor\t: 1
model name\t: Other
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


def test_facts_are_the_same_each_time() -> None:
    assert host_facts() == host_facts()
    assert host_facts().cores >= 1
    assert host_facts().onnxruntime != "none"


def test_a_processor_is_named_with_its_generation() -> None:
    assert cpu_name(X86) == "AMD EPYC, family 25 model 17"
    assert cpu_name(ARM) == "implementer 0x41 part 0xd0c"


def test_a_chip_with_cores_of_two_kinds_is_named_by_both() -> None:
    both = ARM + "\n" + ARM.replace("0xd0c", "0xd05").replace("processor\t: 0", "processor\t: 1")
    assert cpu_name(both) == "implementer 0x41 part 0xd05+0xd0c"


def test_only_instruction_sets_that_matter_are_kept() -> None:
    assert kernel_flags(X86) == ["avx2", "fma"]
    assert kernel_flags(ARM) == ["asimd", "asimddp"]
