from __future__ import annotations

from automl_compress.hardware.host import _cpu_name, _kernel_flags, host_facts, parse_cpuinfo

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
    assert _cpu_name(parse_cpuinfo(X86)) == "AMD EPYC, family 25 model 17"
    assert _cpu_name(parse_cpuinfo(ARM)) == "implementer 0x41 part 0xd0c"


def test_only_instruction_sets_that_matter_are_kept() -> None:
    assert _kernel_flags(parse_cpuinfo(X86)) == ("avx2", "fma")
    assert _kernel_flags(parse_cpuinfo(ARM)) == ("asimd", "asimddp")
