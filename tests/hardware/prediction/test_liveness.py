from __future__ import annotations

from collections.abc import Sequence

import pytest

from automl_compress.hardware.prediction.kernel_key import working_bytes
from automl_compress.hardware.prediction.liveness import live_bytes
from automl_compress.hardware.prediction.sketch import Skeleton, Sketch


def sketch(
    ops: Sequence[str],
    channels: Sequence[int],
    *,
    inputs: Sequence[tuple[int, ...]] | None = None,
    integer: Sequence[int] = (),
    quantized: Sequence[int] = (),
) -> Sketch:
    """Nodes whose values have 100 numbers a channel; each reads the one before unless `inputs` says otherwise."""
    count = range(len(ops))
    skeleton = Skeleton(
        sites=tuple(f"v{i}" for i in count),
        ops=tuple(ops),
        kinds=tuple(ops),
        layers=(None,) * len(ops),
        inputs=tuple(inputs or ((i - 1,) for i in count)),
    )
    numbers = [100 * width for width in channels]
    return Sketch(
        skeleton=skeleton,
        integer=[i in integer for i in count],
        quantized=[i in quantized for i in count],
        omitted=[False] * len(ops),
        bits=[32] * len(ops),
        read=channels,
        written=channels,
        read_numbers=numbers,
        written_numbers=numbers,
        size_terms=(0.0,),
    )


def test_a_node_keeps_what_it_reads_and_what_it_writes() -> None:
    assert live_bytes(sketch(["MatMul", "Softmax", "MatMul"], [8, 8, 2])) == 2 * 3200


def test_a_value_is_kept_for_its_last_reader() -> None:
    assert live_bytes(sketch(["MatMul", "Tanh", "Add"], [8, 8, 8], inputs=[(-1,), (0,), (0, 1)])) == 3 * 3200


def test_an_activation_is_computed_with_the_convolution_before_it() -> None:
    assert live_bytes(sketch(["Conv", "Relu"], [16, 16])) == 6400


def test_convolutions_write_whole_blocks_of_channels() -> None:
    assert live_bytes(sketch(["Conv", "Conv"], [20, 20])) == 2 * 4 * 3200


def test_what_leaves_the_blocks_is_copied() -> None:
    assert live_bytes(sketch(["Conv", "MatMul"], [16, 1])) == 2 * 6400


def test_integers_are_unpacked_and_put_into_blocks_for_a_convolution_that_wants_them_so() -> None:
    both = sketch(["Conv", "Conv"], [32, 1], integer=[0], quantized=[0])
    assert live_bytes(both) == 4 * 3200 + 4 * 3200
    kept = sketch(["Conv", "Conv", "Add"], [32, 32, 32], inputs=[(-1,), (0,), (0, 1)], integer=[0, 2], quantized=[0, 1])
    assert live_bytes(kept) == 3200 + 2 * 4 * 3200


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("QLinearConv|uint8[1,8,8,4]>uint8[1,8,8,6]|w int8[6,4,1,1]|k1x1 s1x1 p0 g1|channels_last=1", 4 * 384),
        ("QLinearConv|uint8[1,8,8,4]>uint8[1,8,8,6]|w int8[6,4,3,3]|k3x3 s1x1 p1 g1", 4 * 384 + 8 * 9 * 64),
        ("Conv|float[1,4,8,8]>float[1,6,8,8]|w float[6,4,3,3]|k3x3 s1x1 p1 g1", 0),
        ("QLinearConv", 0),
    ],
)
def test_an_integer_convolution_works_with_sums_and_addresses(key: str, expected: int) -> None:
    assert working_bytes([key]) == expected
    assert working_bytes([key, key]) == expected
