"""The digits task with a student of its own: a plain network without residual blocks, which competes with the cut one.

    automl-compress search examples/digits/student.py --latency 50% -o runs/own

It is asked for from wide to narrow; the widest that fits the budget on the device is trained against the teacher.
"""

from task import task as task
from torch import nn


def student(width: float) -> nn.Module:
    channels = [max(4, round(width * full)) for full in (32, 64, 96)]
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *channels[:-1]), channels, strict=True):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=1 if inputs == 1 else 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))
