"""CIFAR-10 from `cifar10.npz` or from the standard `cifar-10-batches-py` folder, which is parsed without unpickling."""

import pickletools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_BYTES = 3 * 32 * 32
Split = tuple[Tensor, Tensor]


def load_cifar10(folder: Path) -> tuple[Split, Split]:
    """(train images, labels), (test images, labels); images [N, 3, 32, 32], normalised."""
    archive, batches = folder / "cifar10.npz", folder / "cifar-10-batches-py"
    if archive.is_file():
        with np.load(archive) as stored:
            return tuple(
                (normalise(stored[f"{s}_x"].transpose(0, 3, 1, 2)), labels(stored[f"{s}_y"])) for s in ("train", "test")
            )
    if batches.is_dir():
        parts = [read_batch(path) for path in sorted(batches.glob("data_batch_*"))]
        train = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
        return tuple((normalise(x), labels(y)) for x, y in (train, read_batch(batches / "test_batch")))
    raise FileNotFoundError(f"{folder}: has neither cifar10.npz nor cifar-10-batches-py")


def normalise(images: np.ndarray) -> Tensor:
    scaled = torch.from_numpy(np.array(images, order="C")).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def labels(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def read_batch(path: Path) -> Split:
    """One file of the standard folder: the long byte string are the pixels, the numbers after 'labels' the classes.

    The stream's instructions are listed, not executed.
    """
    pixels, classes, inside = b"", [], False
    for code, value, _ in pickletools.genops(path.read_bytes()):
        if isinstance(value, (str, bytes)):
            raw = value if isinstance(value, bytes) else value.encode("latin-1")
            inside = raw == b"labels"
            pixels = raw if len(raw) >= IMAGE_BYTES and len(raw) > len(pixels) else pixels
        elif inside and code.name in ("BININT", "BININT1", "BININT2"):
            classes.append(value)
    if not classes or len(pixels) != len(classes) * IMAGE_BYTES:
        raise ValueError(f"{path}: not a CIFAR-10 batch ({len(pixels)} bytes of pixels, {len(classes)} labels)")
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32), np.array(classes)
