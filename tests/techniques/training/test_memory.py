"""Batches that don't fit are computed in pieces: as few as possible, with the same gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from automl_compress.errors import TrainingError
from automl_compress.techniques.training.memory import available_bytes, fewest_pieces, kept_bytes, pieces_of
from automl_compress.techniques.training.settings import Resources
from tests.techniques.training.support import PLAIN, X, Y, fit, net, same, task


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("room", [1, 2, 3, 10, 99, 1000])
def test_there_are_as_few_pieces_as_fit(samples: int, room: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= room

    assert fewest_pieces(samples, fits) == -(-samples // room)
    assert len(tried) <= 2 * samples.bit_length() + 1


def test_where_nothing_fits_it_is_said_before_training() -> None:
    with pytest.raises(TrainingError, match="single sample doesn't fit"):
        fewest_pieces(8, lambda _: False)
    with pytest.raises(TrainingError, match="single sample doesn't fit"):
        fit(net(), resources=Resources(device="cpu", memory_bytes=10))


@pytest.mark.parametrize("micro", [1, 2, 5, 16, 63, 64, 100])
def test_pieces_are_the_batch_and_no_single_samples_unless_asked_for(micro: int) -> None:
    pieces = pieces_of(((X, X[:, :2]), Y), micro)
    assert torch.equal(torch.cat([piece[0][1] for piece in pieces]), X[:, :2])
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), Y)
    sizes = [len(piece[1]) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(micro, 3)
    assert micro == 1 or min(sizes) > 1


def test_inputs_without_the_batch_dimension_stay_together() -> None:
    assert len(pieces_of(((X, torch.zeros(3)), Y), 4)) == 1


def test_training_in_pieces_is_training_whole() -> None:
    """Without batch-norm, whose statistics are a piece's."""

    def plain() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))

    whole, parts = plain(), plain()
    fit(whole, task(model=plain(), train=(X, Y)), epochs=5)
    log = fit(parts, task(model=plain(), train=(X, Y)), epochs=5, resources=replace(PLAIN, micro_batch=9))
    assert log.micro_batch == 9
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_kept_for_backward_grows_with_the_batch() -> None:
    model = net().train()
    few, more = (kept_bytes(lambda batch: model(*batch[0]).sum().backward(), ((X[:n],), Y[:n])) for n in (8, 16))
    assert few < more < 2 * few + 1000
    # The hidden layer's activations alone are 8 numbers a sample, kept by several layers.
    assert more - few >= 8 * 8 * 4


def test_the_search_leaves_no_trace_in_what_is_learned() -> None:
    tried, untried = net(), net()
    fit(untried, epochs=2)
    log = fit(tried, epochs=2, resources=Resources(device="cpu", precision="float32", memory_bytes=1 << 30))
    assert log.micro_batch is None
    assert same(tried, untried)


def test_a_batch_beyond_memory_is_split_and_that_is_said() -> None:
    log = fit(net(), epochs=1, resources=Resources(device="cpu", precision="float32", memory_bytes=6000))
    assert log.micro_batch is not None
    assert 1 < log.micro_batch < 32
    assert log.notes == (f"batches of 32 are computed {log.micro_batch} samples at a time, to fit in memory",)


def test_there_is_some_memory_here() -> None:
    assert available_bytes() > 1 << 20
