"""How a layer's mask is written: which of its weights become zero while its shape stays.

none           no mask
0.5            half of the weights, those with the least magnitude in the whole layer
0.5 by row     the same with each magnitude relative to the L2 norm of its output's weights
<0.02          every weight of a magnitude below 0.02; with 'by row' relative as above
2:4            of four consecutive input channels, at each output and kernel position, the two largest stay
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from automl_compress.core.graph import Layer
from automl_compress.errors import PlanError

NO_MASK = "none"
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_FORMS = re.compile(rf"(?:(?P<below><)?\s*(?P<value>{_NUMBER})(?P<row> by row)?|(?P<kept>\d+):(?P<of>\d+))")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """kind 'ratio': `value` of the weights become zero; 'threshold': those below `value`; 'pattern': `kept` of each
    `of` stay. `by_row`: magnitudes are relative to the L2 norm of an output's weights."""

    kind: Literal["ratio", "threshold", "pattern"]
    value: float = 0.0
    by_row: bool = False
    kept: int = 0
    of: int = 0


def parse_mask(text: str) -> Mask:
    """Read a mask other than 'none'. Raises PlanError for what is none."""
    found = _FORMS.fullmatch(text.strip())
    if found is None:
        raise PlanError(f"mask {text!r} is not 'none', a ratio (0.5, '0.5 by row'), a threshold ('<0.02') or '2:4'")
    if found["of"]:
        kept, of = int(found["kept"]), int(found["of"])
        if not 1 <= kept < of:
            raise PlanError(f"mask {text!r}: N:M keeps N of M weights and needs 1 <= N < M")
        return Mask(kind="pattern", kept=kept, of=of)
    value, by_row = float(found["value"]), bool(found["row"])
    if found["below"]:
        return Mask(kind="threshold", value=value, by_row=by_row)
    if not 0 < value < 1:
        raise PlanError(f"mask {text!r}: a ratio must be above 0 and below 1; 'none' changes nothing")
    return Mask(kind="ratio", value=value, by_row=by_row)


def mask_problem(text: str, layer: Layer) -> str | None:
    """Why the layer can't have the mask, with the way out; None if it can."""
    if text == NO_MASK:
        return None
    mask = parse_mask(text)
    inputs = layer.in_channels // layer.groups
    if mask.kind != "pattern" or inputs % mask.of == 0:
        return None
    which = "input channels" if layer.groups == 1 else "input channels in each of its groups"
    return (
        f"{layer.name}: {text} sparsity needs {which} divisible by {mask.of}, found {inputs}; "
        f"use 'none' for it in the search space"
    )
