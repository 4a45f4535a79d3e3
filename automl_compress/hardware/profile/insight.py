"""What a profile's figures say, how far they can be trusted, and how two profiles differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from automl_compress.hardware.profile.migrate import VERSION
from automl_compress.hardware.profile.profile import DeviceProfile
from automl_compress.hardware.profile.schema import KernelRecord
from automl_compress.hardware.profile.trust import UNTRUSTED_SPREAD

# A profile whose predictions are further off than this on models that it didn't see deserves a warning.
_POOR_FIT = 0.05
_SHOWN = 10


def untrusted(profile: DeviceProfile) -> list[KernelRecord]:
    """Kernels whose rounds or sightings disagree by a tenth or more, the worst first.

    Durations are read in whole microseconds, so that of kernels below five a tenth says nothing; they don't count.
    """
    doubtful = (k for k in profile.kernels.values() if k.spread >= UNTRUSTED_SPREAD and k.mean_us >= 5)
    return sorted(doubtful, key=lambda kernel: kernel.spread * kernel.mean_us, reverse=True)


def warnings(profile: DeviceProfile) -> list[str]:
    """What a user should know before trusting a profile, a line each; empty if nothing."""
    found = [*profile.warnings, *profile.notes]
    if profile.version < VERSION:
        found.append(f"version {profile.version} of the format; --upgrade, or the next measurement, makes it {VERSION}")
    doubtful, count = untrusted(profile), len(profile.kernels)
    if doubtful:
        worst = doubtful[0]
        found.append(
            f"{len(doubtful)} of {count} kernels have a spread of {UNTRUSTED_SPREAD:.0%} or more, worst {worst.key} "
            f"({worst.mean_us:.1f} us, {worst.spread:.0%}); delete their lines to have them measured on a quiet machine"
        )
    shaky = sum(model.spread >= UNTRUSTED_SPREAD for model in profile.models)
    if shaky:
        share = f"{shaky} of {len(profile.models)} whole models"
        found.append(f"{share} have a spread of {UNTRUSTED_SPREAD:.0%} or more; delete their lines, too")
    noted = (kernel.conditions.split("; ") for kernel in profile.kernels.values() if kernel.conditions)
    special = Counter(kind for kinds in noted for kind in set(kinds))
    found += [f"{number} of {count} kernels were measured under: {kind}" for kind, number in sorted(special.items())]
    for family, fit in profile.corrections.items():
        if fit.error is not None and fit.error > _POOR_FIT:
            found.append(f"correction {family}: models left out are predicted {fit.error:.1%} wrong (median)")
    processes = profile.provenance == "measured" and profile.header.memory.model == "process"
    if processes and profile.models and all(model.memory_bytes is None for model in profile.models):
        found.append("no model was weighed: memory is predicted by a general rule until a network is profiled")
    if profile.provenance == "measured" and not count:
        found.append("nothing was measured yet")
    return found


def overview(profile: DeviceProfile) -> dict[str, Any]:
    """A profile in brief, as JSON: header, counts, slowest and least certain kernels, corrections, warnings."""
    kernels = list(profile.kernels.values())
    return {
        "file": str(profile.path),
        "version": profile.version,
        "header": profile.header.model_dump(mode="json", by_alias=True, exclude={"version"}),
        "kernels": len(kernels),
        "provenance": dict(Counter(kernel.provenance for kernel in kernels)),
        "models": len(profile.models),
        "weighed": sum(model.memory_bytes is not None for model in profile.models),
        "slowest": [_brief(k) for k in sorted(kernels, key=lambda k: k.mean_us, reverse=True)[:_SHOWN]],
        "untrusted": [_brief(k) for k in untrusted(profile)],
        "corrections": [
            {
                "family": fit.key,
                "coefficients": dict(fit.coefficients),
                "records": fit.records,
                "error": fit.error,
                "p95_error": fit.p95_error,
                "worst_error": fit.worst_error,
                "date": fit.date,
            }
            for fit in profile.corrections.values()
        ],
        "warnings": warnings(profile),
    }


def difference(first: DeviceProfile, second: DeviceProfile) -> dict[str, Any]:
    """How two profiles differ, as JSON.

    header    field -> [first, second], where they differ
    kernels   how many both have; `ratio`: second over first as 5 %, 50 % and 95 % quantiles; `outliers`: those whose
              ratio is a tenth or more away from the median, the furthest first
    models    the same of whole models
    """
    kernels = {k: (r.mean_us, second.kernels[k].mean_us) for k, r in first.kernels.items() if k in second.kernels}
    models = {m.key: (m.measured_us, n.measured_us) for m in first.models if (n := second.model(m.key))}
    return {
        "files": [str(first.path), str(second.path)],
        "header": header_differences(first, second),
        "kernels": {
            "only_first": len(first.kernels) - len(kernels),
            "only_second": len(second.kernels) - len(kernels),
            **_ratios(kernels),
        },
        "models": {
            "only_first": len(first.models) - len(models),
            "only_second": len(second.models) - len(models),
            **_ratios(models),
        },
    }


def header_differences(first: DeviceProfile, second: DeviceProfile) -> dict[str, list[Any]]:
    """Field -> its value in both headers, where they differ; nested fields read 'runtime.version'."""
    flat = [flattened(p.header.model_dump(mode="json", by_alias=True)) for p in (first, second)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return {n: [flat[0].get(n), flat[1].get(n)] for n in names if flat[0].get(n) != flat[1].get(n)}


def flattened(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        inner = isinstance(value, Mapping) and value
        flat.update(flattened(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value})
    return flat


def _brief(kernel: KernelRecord) -> dict[str, Any]:
    return {
        "kernel": kernel.key,
        "mean_us": kernel.mean_us,
        "spread": kernel.spread,
        "count": kernel.count,
        "provenance": kernel.provenance,
        **({"conditions": kernel.conditions} if kernel.conditions else {}),
    }


def _ratios(pairs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    ratios = {key: ours / theirs for key, (theirs, ours) in pairs.items() if theirs > 0}
    if not ratios:
        return {"common": len(pairs), "ratio": None, "outliers": []}
    low, median, high = (float(v) for v in np.percentile(list(ratios.values()), [5, 50, 95]))
    far = [key for key in ratios if abs(ratios[key] / median - 1) >= UNTRUSTED_SPREAD] if median > 0 else []
    far.sort(key=lambda key: abs(np.log(max(ratios[key], 1e-9) / median)), reverse=True)
    return {
        "common": len(pairs),
        "ratio": {"p5": low, "median": median, "p95": high},
        "outliers": [{"key": key, "first_us": pairs[key][0], "second_us": pairs[key][1]} for key in far],
    }
