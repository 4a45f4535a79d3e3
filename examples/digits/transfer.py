"""The digits network, pretrained to tell ten digits, becomes one that tells odd from even, and is compressed as such.

    automl-compress search examples/digits/transfer.py --latency 50% -o runs/odd

The last linear layer is exchanged for one with two outputs; it is trained first, then everything is. The result is the
teacher of the search.
"""

import torch
from task import task as pretrained

from automl_compress import Task, Transfer


def odd(split: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    images, digits = split
    return images, digits % 2


def task() -> Task:
    known = pretrained()
    return Task(
        model=known.model,
        train=odd(known.train),
        validation=odd(known.validation),
        test=odd(known.test),
        transfer=Transfer(classes=2, head_epochs=2, epochs=2),
    )
