"""Every random state that a training reads, so that it can be repeated and taken up again in the middle.

Beside the generators of torch, numpy and Python these are generators that the data hold: what a loader, its dataset,
sampler and transforms reach through attributes, containers and closures.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

State = list[Any]  # plain values, one entry for each generator
Generators = list[Any]
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEPTH = 8
_LONGEST = 64  # containers beyond this hold data, not transforms


def generators_in(data: Any) -> Generators:
    """Generators that an object holds, in a fixed order."""
    found: Generators = []
    _walk(data, found, set(), 0)
    return found


@contextmanager
def seeded(seed: int, own: Generators) -> Iterator[None]:
    """Within, all random states start from `seed`; afterwards they are what they were."""
    before = capture(own)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for number, generator in enumerate(own, start=1):
        _reseed(generator, (seed + number) % 2**32)
    try:
        yield
    finally:
        restore(before, own)


def capture(own: Generators) -> State:
    """All random states as plain values."""
    cuda = [_of_bytes(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return [
        _of_bytes(torch.get_rng_state()),
        cuda,
        [name, keys.tolist(), *rest],
        _of_python(random.getstate()),
        *(_state(generator) for generator in own),
    ]


def restore(state: State, own: Generators) -> None:
    """Set what `capture` returned."""
    main, cuda, legacy, python, *others = state
    torch.set_rng_state(_as_bytes(main))
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_as_bytes(part) for part in cuda])
    np.random.set_state((legacy[0], np.array(legacy[1], dtype=np.uint32), *legacy[2:]))
    random.setstate(_as_python(python))
    for generator, value in zip(own, others, strict=True):
        _set(generator, value)


def _walk(value: Any, found: Generators, seen: set[int], depth: int) -> None:
    if (
        depth > _DEPTH
        or id(value) in seen
        or isinstance(value, (str, bytes, int, float, Tensor, np.ndarray, nn.Module))
    ):
        return
    seen.add(id(value))
    if isinstance(value, _KINDS):
        found.append(value)
        return
    if isinstance(value, (type, ModuleType)):
        return
    for part in _parts(value):
        _walk(part, found, seen, depth + 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())[:_LONGEST]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)[:_LONGEST] if len(value) <= _LONGEST else ()
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else ()


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return _of_bytes(generator.get_state())
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _of_python(generator.getstate())


def _set(generator: Any, value: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(_as_bytes(value))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(value)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(value))
    else:
        generator.setstate(_as_python(value))


def _of_bytes(state: Tensor) -> str:
    return bytes(state.cpu().numpy().tobytes()).hex()


def _as_bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), dtype=np.uint8).copy())


def _of_python(state: Any) -> list[Any]:
    return [state[0], list(state[1]), state[2]]


def _as_python(value: list[Any]) -> Any:
    return value[0], tuple(value[1]), value[2]


def _plain(value: Any) -> Any:
    """Arrays in a numpy state as {'dtype', 'values'}."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "values"}:
            return np.array(value["values"], dtype=value["dtype"])
        return {key: _arrays(part) for key, part in value.items()}
    return value
