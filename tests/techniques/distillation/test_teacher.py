from dataclasses import replace

import torch
from torch import nn

from automl_compress.model.task import Task
from automl_compress.search.evaluation.identity import digest_of
from automl_compress.techniques.distillation.cache import AnswerCache
from automl_compress.techniques.distillation.losses import Losses
from automl_compress.techniques.distillation.objective import Distillation
from automl_compress.techniques.distillation.teacher import Teacher, worth_of_teaching

IMAGES = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def mirrored(images):
    return images.flip(-1)


def upside_down(images):
    return images.flip(-2)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def task(network, *, views=(), targets=None):
    targets = torch.zeros(6, dtype=torch.long) if targets is None else targets
    batches = [((IMAGES,), targets)]
    return Task(model=network, train=batches, validation=batches, views=views, example_inputs=(IMAGES,))


def test_outputs_are_the_mean_over_inputs_and_views_and_features_are_those_of_the_inputs():
    network = model()
    with torch.no_grad():
        expected = (network(IMAGES) + network(IMAGES.flip(-1)) + network(IMAGES.flip(-2))) / 3
    plain = Teacher(network, ["3"])((IMAGES,))
    averaged = Teacher(network, ["3"], views=[mirrored, upside_down])((IMAGES,))
    (name,) = averaged.outputs
    torch.testing.assert_close(averaged.outputs[name], expected)
    assert torch.equal(averaged.features["3"], plain.features["3"])


def test_remembered_answers_are_those_over_all_views():
    teacher = Teacher(model(), cache=AnswerCache(), views=[mirrored])
    first, again = teacher((IMAGES,)), teacher((IMAGES,))
    assert all(torch.equal(first.outputs[name], again.outputs[name]) for name in first.outputs)


def test_a_student_that_answers_for_the_views_has_nothing_more_to_learn():
    network = model()

    class Averaged(nn.Module):
        def forward(self, images):
            return (network(images) + network(images.flip(-1))) / 2

    def loss(views):
        return Distillation(task(network, views=views), network, Losses(weights={"logit": 1.0}))

    batch = ((IMAGES,), torch.zeros(6, dtype=torch.long))
    with torch.no_grad():
        over_views = loss([mirrored])(Averaged().eval(), batch).parts["logit"]
        alone = loss([])(Averaged().eval(), batch).parts["logit"]
    assert over_views < 1e-10 < 1e-4 < alone


def test_what_views_are_worth_is_told_and_views_that_mean_something_else_are_warned_about():
    class Sided(nn.Module):
        """Class 0 where the right is brighter, by a margin that a mirror image reverses, and more."""

        def forward(self, images):
            sides = images[..., 2:].mean((1, 2, 3)) - images[..., :2].mean((1, 2, 3))
            score = torch.where(sides > 0, sides, 3 * sides)
            return torch.stack([score, -score], dim=1)

    network = Sided().eval()
    right = network(IMAGES).argmax(1)
    told = worth_of_teaching(task(network, views=[mirrored], targets=right))
    assert told.startswith("warning: students learn from what is worse; accuracy on 6 validation samples: ")
    assert "the model 1.0000, over its views 0." in told
    assert not worth_of_teaching(task(network))
    told = worth_of_teaching(task(network, views=[upside_down], targets=right))
    assert told == "accuracy on 6 validation samples: the model 1.0000, over its views 1.0000"


def test_a_teacher_that_is_worse_than_the_model_is_warned_about():
    class Reversed(nn.Module):
        def forward(self, images):
            return {"logits": -network(images)}

    network = model()
    right = task(network, targets=network(IMAGES).argmax(1))
    told = worth_of_teaching(replace(right, teacher=Reversed(), views=[lambda images: images]))
    assert told.startswith("warning: students learn from what is worse")
    assert told.endswith("the model 1.0000, the teacher 0.0000, over its views 0.0000")


def test_other_views_make_another_task():
    network = model()
    views = [], [lambda images: images.flip(-1)], [lambda images: images.flip(-2)]
    assert len({digest_of(task(network, views=v)) for v in views}) == 3
