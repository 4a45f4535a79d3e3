"""A remembered teacher says what the real one says, is asked once for each sample, and gives up where it can't help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automl_compress.core.plan import Plan
from automl_compress.errors import TrainingError
from automl_compress.model.task import Task, prepare
from automl_compress.model.trace import trace
from automl_compress.techniques.distillation.cache import AnswerCache, digests
from automl_compress.techniques.distillation.losses import parse_losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.pairing import pair_layers
from automl_compress.techniques.distillation.teacher import Teacher, samples_per_epoch
from automl_compress.techniques.training.log import StepReport
from automl_compress.techniques.training.loop import train
from automl_compress.techniques.training.settings import Resources, Training
from tests import tiny

X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
GRAPH = trace(tiny.teacher(), (X,))
EXACT = Resources(device="cpu", precision="float32", micro_batch=128)


class Counting(nn.Module):
    """The tiny teacher, which knows how many samples it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.samples = tiny.teacher(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.net(x)


def test_known_samples_get_the_same_answer_in_any_order_and_mixture() -> None:
    model, cache = Counting(), AnswerCache()
    teacher, plain = Teacher(model, ["net.down"], cache), Teacher(Counting(), ["net.down"])
    first = teacher((X[:16],))
    assert torch.equal(first.outputs["output"], plain((X[:16],)).outputs["output"])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for chosen in (torch.arange(15, -1, -1), order):
        known, wanted = teacher((X[chosen],)), plain((X[chosen],))
        torch.testing.assert_close(known.outputs["output"], wanted.outputs["output"])
        torch.testing.assert_close(known.features["net.down"], wanted.features["net.down"])
    assert torch.equal(teacher((X[:16],)).outputs["output"], first.outputs["output"])  # bit by bit
    assert model.samples == 24
    assert (cache.asked, cache.hits) == (16 + 16 + 24 + 16, 16 + 16 + 16)
    assert cache.words.startswith("67% of the teacher's 72 answers")


def test_unique_samples_are_asked_about_every_time_and_take_no_memory() -> None:
    model, cache = Counting(), AnswerCache()
    teacher, wanted = Teacher(model, ["net.down"], cache), Teacher(Counting(), ["net.down"])((X,))
    teacher((X,), unique=8)
    size = cache.size_bytes
    known = teacher((X,), unique=8)
    torch.testing.assert_close(known.outputs["output"], wanted.outputs["output"])
    torch.testing.assert_close(known.features["net.down"], wanted.features["net.down"])
    assert (model.samples, cache.hits, cache.size_bytes) == (24 + 8, 16, size)
    teacher((X,))
    assert (model.samples, cache.hits) == (24 + 8 + 8, 16 + 16)
    assert cache.size_bytes == pytest.approx(1.5 * size)


def test_digests_know_bytes_types_and_shapes_but_not_memory_formats() -> None:
    assert digests((X,)) == digests((X.to(memory_format=torch.channels_last),))
    assert len(set(digests((X,)))) == len(X)
    assert digests((X,))[3] == digests((X[3:4],))[0]
    assert digests((X,)) != digests((X.flatten(1),))
    assert digests((torch.zeros(1, 2),)) != digests((torch.zeros(1, 2, dtype=torch.int32),))
    assert digests((X, X))[0] != digests((X,))[0]
    nudged = X.clone()
    nudged[5, 0, 3, 3] += 1e-6
    assert [a == b for a, b in zip(digests((X,)), digests((nudged,)), strict=True)].index(False) == 5
    assert digests((torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.bool)))


def test_other_layers_and_another_precision_are_other_answers() -> None:
    model, cache = Counting(), AnswerCache()
    Teacher(model, [], cache)((X,))
    Teacher(model, ["net.down"], cache)((X,))
    with torch.autocast("cpu", torch.bfloat16):
        halved = Teacher(model, [], cache)((X,))
        assert torch.equal(halved.outputs["output"], Teacher(model, [], cache)((X,)).outputs["output"])
    assert model.samples == 3 * len(X)
    assert cache.hits == len(X)


def test_memory_is_bounded_and_what_fits_is_kept() -> None:
    model, cache = Counting(), AnswerCache(limit_bytes=6000)
    teacher = Teacher(model, [], cache)
    teacher((X,))
    assert 0 < cache.size_bytes <= 6000
    kept = cache.size_bytes // (4 * 4 + 300)
    model.samples = 0
    teacher((X,))
    assert model.samples == len(X) - kept
    assert cache.size_bytes <= 6000
    nothing = AnswerCache(limit_bytes=0)
    Teacher(model, [], nothing)((X,))
    assert (nothing.size_bytes, nothing.hit_rate) == (0, 0.0)


def test_where_few_are_known_all_are_asked_about_and_the_new_ones_kept() -> None:
    model, cache = Counting(), AnswerCache()
    teacher = Teacher(model, [], cache)
    teacher((X[:6],))
    wanted = Teacher(Counting(), [])((X,)).outputs["output"]
    model.samples = 0
    torch.testing.assert_close(teacher((X,)).outputs["output"], wanted)
    assert (model.samples, cache.hits) == (24, 0)
    torch.testing.assert_close(teacher((X.flip(0),)).outputs["output"], wanted.flip(0))
    assert (model.samples, cache.hits) == (24, 24)


def test_it_turns_itself_off_after_an_epoch_without_hits() -> None:
    model, cache = Counting(), AnswerCache()
    teacher = Teacher(model, [], cache)
    cache.begin(43)
    teacher((X,))
    assert cache.size_bytes > 0
    for shift in (1, 2, 2):
        teacher((X + shift,))
    assert cache.hits == 0  # neither kept nor found
    assert model.samples == 4 * len(X)


def test_a_batch_that_an_earlier_training_asked_about_needs_no_teacher_and_waits_no_longer_than_that_can_be() -> None:
    model, cache = Counting(), AnswerCache()
    teacher = Teacher(model, [], cache)
    for _ in range(3):
        cache.begin(43)
        first, second = teacher((X,)), teacher((X + 1,))
        assert model.samples == 2 * len(X)
        assert not torch.equal(first.outputs["output"], second.outputs["output"])
    assert (cache.asked, cache.hits) == (6 * len(X), 4 * len(X))
    cache.begin(43)
    teacher((X[:23],))  # one sample less is another batch
    assert model.samples == 2 * len(X) + 23
    for shift in range(2, 20):
        teacher((X + shift,))
    model.samples = 0
    cache.begin(43)
    teacher((X,))
    assert model.samples == len(X)


def test_batches_that_wait_make_room_for_what_a_training_remembers() -> None:
    model, cache = Counting(), AnswerCache(limit_bytes=8000)
    teacher = Teacher(model, [], cache)
    teacher((X,))
    whole = cache.size_bytes
    assert 4000 < whole <= 8000
    cache.begin(None)
    assert cache.size_bytes == whole
    teacher((X + 1,))
    assert cache.size_bytes == whole
    model.samples = 0
    teacher((X + 1,))
    assert model.samples == 0


def test_without_a_known_length_it_stays_on() -> None:
    cache = AnswerCache()
    cache.begin(None)
    teacher = Teacher(Counting(), [], cache)
    for shift in (*range(5), 0):
        teacher((X + shift,))
    assert cache.hits == len(X)


def test_answers_without_a_row_a_sample_are_asked_for_every_time() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.mean()

    cache = AnswerCache()
    teacher = Teacher(Whole(), [], cache)
    teacher((X,))
    assert torch.equal(teacher((X[:5],)).outputs["output 1"], X[:5].mean())
    assert (cache.hits, cache.size_bytes) == (0, 0)


class Augmented:
    """Batches with noise drawn from torch's generator, as an augmentation draws it."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, classes = tiny.split(128, 1)
        for index in torch.randperm(128).split(32):
            yield images[index] + torch.randn(32, 1, 8, 8), classes[index]


def trained(
    data: Any, cache: AnswerCache | None, epochs: float = 3, losses: str = "soft+features", seed: int = 5
) -> nn.Module:
    model = tiny.teacher()
    ready = prepare(Task(model=model, train=data, validation=tiny.split(64, 2)))
    if cache is not None:
        cache.begin(samples_per_epoch(ready))
    torch.manual_seed(3)
    student = tiny.Net(16)
    objective = Distillation(ready, model, parse_losses(losses), pair_layers(GRAPH, Plan(), model), cache)
    train(student, ready, objective, Training(epochs=epochs), seed=seed, resources=EXACT)
    return student


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_student_is_bit_equal_where_batches_are_composed_as_before() -> None:
    images, classes = tiny.split(128, 1)
    batches = list(zip(images.split(32), classes.split(32), strict=True))
    cache = AnswerCache()
    assert equal(trained(batches, cache), trained(batches, None))
    assert cache.hit_rate == pytest.approx(2 / 3)


def test_shuffled_data_is_found_by_sample_and_the_student_is_the_same_but_for_rounding() -> None:
    cache = AnswerCache()
    with_it, without = trained(tiny.split(128, 1), cache, 2), trained(tiny.split(128, 1), None, 2)
    assert cache.hit_rate == pytest.approx(1 / 2)
    for one, other in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_augmentation_that_follows_the_seed_is_found_by_the_next_candidate() -> None:
    cache = AnswerCache()
    first = trained(Augmented(), cache, 2, "soft")
    assert cache.hits == 0
    second = trained(Augmented(), cache, 1, "soft")
    assert cache.hits == 128
    assert equal(second, trained(Augmented(), None, 1, "soft"))
    assert not equal(first, second)


def test_epochs_are_counted_in_samples() -> None:
    assert samples_per_epoch(prepare(tiny.task())) == 512
    assert samples_per_epoch(prepare(Task(model=tiny.teacher(), train=Augmented(), validation=tiny.split(9, 1)))) == 128

    class Unsized:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([tiny.split(9, 1)])

    assert samples_per_epoch(prepare(Task(model=tiny.teacher(), train=Unsized(), validation=tiny.split(9, 1)))) is None


class Shuffled:
    """Batches of the same samples in another order each time, some of them noisy: known ones are asked about again with
    others that are not."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, classes = tiny.split(60, 1)
        noisy = torch.where(torch.rand(60, 1, 1, 1) < 0.2, images + 0.1 * torch.randn_like(images), images)
        for index in torch.randperm(60).split(13):
            yield noisy[index], classes[index]


class Stop(Exception):
    pass


def interrupted(file: Path, stops: tuple[int, ...], *, limit_bytes: int) -> tuple[nn.Module, AnswerCache]:
    """A student trained with a cache, stopped after these steps, each time in a new process as far as it can tell."""
    model, resources = tiny.teacher(), replace(EXACT, checkpoint=file, checkpoint_seconds=0.0)
    ready = prepare(Task(model=model, train=Shuffled(), validation=tiny.split(64, 2)))
    for stop in (*stops, None):
        cache = AnswerCache(limit_bytes)
        cache.begin(60)
        torch.manual_seed(3)
        student = tiny.Net(16)
        objective = Distillation(ready, model, parse_losses("soft+features"), pair_layers(GRAPH, Plan(), model), cache)

        def on_step(report: StepReport, stop: int | None = stop) -> None:
            if report.step == stop:
                raise Stop

        with suppress(Stop):
            train(student, ready, objective, Training(epochs=3), seed=5, resources=resources, on_step=on_step)
    return student, cache


@pytest.mark.parametrize("limit_bytes", [1 << 20, 500_000, 0])
def test_interrupted_and_resumed_is_uninterrupted_with_remembered_answers(tmp_path: Path, limit_bytes: int) -> None:
    whole, cache = interrupted(tmp_path / "whole", (), limit_bytes=limit_bytes)
    assert (cache.hit_rate > 0.3) == (limit_bytes > 0)
    for stop in range(1, 15, 1 if limit_bytes else 5):
        parts, _ = interrupted(tmp_path / f"at {stop}", (stop,), limit_bytes=limit_bytes)
        assert equal(whole, parts), f"stopped after step {stop}"
    assert equal(whole, interrupted(tmp_path / "often", (1, 3, 4, 9, 14), limit_bytes=limit_bytes)[0])


def test_what_an_earlier_training_remembered_changes_no_bit(tmp_path: Path) -> None:
    cache = AnswerCache()
    alone = trained(tiny.split(128, 1), AnswerCache(), 2)
    for seed in (5, 5, 6, 5):
        cache.hits = 0
        assert equal(trained(tiny.split(128, 1), cache, 2, seed=seed), alone) == (seed == 5)
        assert cache.hits >= 128


def test_damaged_answers_are_named(tmp_path: Path) -> None:
    interrupted(tmp_path / "c", (4,), limit_bytes=1 << 20)
    (tmp_path / "c.answers-1").write_bytes(b"none")
    with pytest.raises(TrainingError, match=r"answers-1: .* missing or damaged .*; delete .*c to start anew"):
        interrupted(tmp_path / "c", (), limit_bytes=1 << 20)


def test_answers_to_batches_of_unequal_lengths_are_written_and_read_again(tmp_path: Path) -> None:
    def ask(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"output": inputs[0] * 2.0}

    beside, cache = tmp_path / "full.training", AnswerCache()
    batches = [torch.randn(4, length, generator=torch.Generator().manual_seed(length)) for length in (5, 7, 5)]
    for batch in batches:
        cache.answers("", (batch,), ask)
    facts = cache.write(beside)

    def nobody(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        raise AssertionError("all of them are known")

    again = AnswerCache()
    again.read(beside, facts)
    for batch in batches:
        assert torch.equal(again.answers("", (batch,), nobody)["output"], batch * 2.0)
    assert again.size_bytes == cache.size_bytes
