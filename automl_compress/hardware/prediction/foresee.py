"""What a profile would predict of the models that it measured, had it not measured them.

A correction that turns sums of kernels into latencies must be fitted to predictions as they will be made: of models
whose own traces aren't among what is known. What was predicted just before each was measured is only that for the last
ones, when nearly everything was known. So at the end models are left out a fifth at a time, and the others' sightings
of their kernels predict them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from automl_compress.hardware.prediction.interpolate import PriceList
from automl_compress.hardware.prediction.kernel_key import traffic_bytes
from automl_compress.hardware.profile.profile import DeviceProfile

_FOLDS = 5


def foresee(profile: DeviceProfile, models: Mapping[str, Sequence[str]]) -> None:
    """Store the predictions. `models`: digest of a structure -> the keys of its kernels, in order.

    A sighting is known by the traffic of the model that it was made in; models of equal traffic are left out together.
    Raises ProfileError if the profile can't be written.
    """
    measured = sorted(key for key in models if profile.model(key) is not None)
    traffic = {key: traffic_bytes(models[key]) for key in measured}
    groups = sorted(set(traffic.values()))
    found = []
    for fold in range(_FOLDS):
        left_out = set(groups[fold::_FOLDS])
        chosen = [key for key in measured if traffic[key] in left_out]
        rest = {key: record.without(left_out) for key, record in profile.kernels.items()}
        prices = PriceList({key: record for key, record in rest.items() if record is not None})
        for key in chosen:
            total, record = prices.total(models[key]), profile.model(key)
            assert record is not None
            found.append(replace(record, predicted_us=round(total.us, 3), foreseen=round(total.measured_share, 4)))
    profile.add_models(found)
