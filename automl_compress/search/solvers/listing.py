"""Plans from cheap to dear by the table: all of a small space, of a large one the cheap end.

Best first from the cheapest plans that descent finds: of the plans that were met, the cheapest one whose single changes
weren't looked at is next. What is a little dearer than the cheapest is nearly always a change or two away from it.
"""

from __future__ import annotations

import heapq

import numpy as np

from automl_compress.search.solvers.quick import QuickDecoder
from automl_compress.search.table.states import Floats, States

_TOGETHER = 16  # plans whose changes are looked at together
_AROUND = 64  # plans whose changes are looked at, however many these are
_MET = 4096


def cheapest_first(decoder: QuickDecoder, limits: Floats) -> tuple[States, Floats]:
    """(plans, each once; the larger of their costs over the limits), from the lowest on.

    limits   over `ADDITIVE`, infinity where there is none
    """
    arrays, neighbours = decoder.arrays, decoder.neighbours
    starts = [decoder.descent.cheapest(int(metric)) for metric in np.flatnonzero(np.isfinite(limits))]
    found, shares = States.stack(starts), np.zeros(0)
    met: set[bytes] = set()
    parts: list[States] = []
    waiting: list[tuple[float, int]] = []
    looked = 0
    while True:
        digests = arrays.digests(found)
        first = {digest: row for row, digest in reversed(list(enumerate(digests))) if digest not in met}
        new = found.take(sorted(first.values()))
        met |= first.keys()
        parts.append(new)
        share = (arrays.costs(new) / limits).max(axis=1)
        for row, value in enumerate(share.tolist()):
            heapq.heappush(waiting, (value, len(shares) + row))
        shares = np.concatenate([shares, share])
        if not waiting or (looked >= _AROUND and len(met) >= _MET):
            break
        known = States.stack(parts)
        parts = [known]
        next_ones = [heapq.heappop(waiting)[1] for _ in range(min(_TOGETHER, len(waiting)))]
        looked += len(next_ones)
        around = known.take(next_ones)
        changes = neighbours.changes(around, arrays.losses([{}] * len(around)))
        rows, possible = np.nonzero(np.isfinite(changes.loss))
        found = neighbours.apply(around.take(rows), possible[:, None])
    order = np.argsort(shares, kind="stable")
    return States.stack(parts).take(order), shares[order]
