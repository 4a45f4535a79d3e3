import pytest
import torch
from torch import nn

from automl_compress.errors import TaskError
from automl_compress.model.task import Task, prepare
from automl_compress.model.views import seen

IMAGES = torch.randn(4, 3, 8, 8)


def mirrored(images):
    return images.flip(-1)


def test_a_view_gets_inputs_as_the_model_does():
    tokens, mask = torch.arange(6).view(2, 3), torch.ones(2, 3)
    shown = seen(lambda ids, kept: [ids.flip(0), kept], (tokens, mask))
    assert torch.equal(shown[0], tokens.flip(0))
    assert shown[1] is mask
    assert torch.equal(seen(mirrored, (IMAGES,))[0], IMAGES.flip(-1))


@pytest.mark.parametrize(
    ("view", "told"),
    [
        (lambda images: images[:, :, 1:], r"made \(4, 3, 7, 8\) float32 of inputs \(4, 3, 8, 8\) float32"),
        (lambda images: images.double(), "float64 of inputs"),
        (lambda images: images.missing, r"on inputs \(4, 3, 8, 8\) float32 raised AttributeError"),
        (lambda images: None, "must return a tensor or a tuple of tensors, as it gets them, found NoneType"),
    ],
)
def test_a_view_that_shows_something_else_is_refused(view, told):
    with pytest.raises(TaskError, match=told):
        seen(view, (IMAGES,))


@pytest.mark.parametrize(
    ("views", "told"),
    [
        (mirrored, "views must be a list of functions, found function"),
        (["mirror"], "views must be functions of the model's inputs, found str"),
        ([lambda images: images[..., 1:]], "shapes and types must stay"),
    ],
)
def test_a_task_is_refused_before_anything_is_trained(views, told):
    data = (IMAGES, torch.arange(4))
    with pytest.raises(TaskError, match=told):
        prepare(
            Task(
                model=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
                train=data,
                validation=data,
                views=views,
            )
        )
