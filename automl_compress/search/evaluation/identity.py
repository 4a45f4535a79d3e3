"""What identifies a trained model: by it a run folder, a study and a cache are told from another model's."""

from __future__ import annotations

import hashlib

from automl_compress.model.task import Task
from automl_compress.model.views import seen


def digest_of(task: Task) -> str:
    """Identifies the trained model, and whatever else students learn from, and how much validation data there is; its
    order may differ from run to run."""
    digest = hashlib.sha256()
    for model in filter(None, (task.model, task.teacher)):
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for view in task.views:
        # By what it shows: functions without a name of their own can't be told apart otherwise.
        for part in seen(view, task.example_inputs):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    if task.transfer is not None:
        digest.update(repr(task.transfer).encode())
    digest.update(str(len(task.validation) if hasattr(task.validation, "__len__") else None).encode())
    return digest.hexdigest()[:16]
