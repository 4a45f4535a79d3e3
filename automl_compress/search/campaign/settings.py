"""What a run was asked for, what of it takes effect, and how to ask for it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from automl_compress import __version__
from automl_compress.core.budget import METRICS, Limit, parse_budget, share_of
from automl_compress.core.goal import Front, Goal, parse_aim
from automl_compress.errors import InputError
from automl_compress.recovery.names import check_mode
from automl_compress.recovery.students import parse_students
from automl_compress.search.campaign.baselines import check_effort
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.options import EPOCHS, TRIALS, Options
from automl_compress.search.campaign.timing import Clock
from automl_compress.techniques.distillation.losses import Losses, parse_losses
from automl_compress.techniques.training.settings import Training, parse_training

_LIBRARIES = ("torch", "onnx", "onnxruntime", "optuna", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one run with their defaults filled in.

    limits     the budgets as written; with an `aim` there may be none
    aim        the cheapest good enough model, or a front; None: the best model within the limits
    from_spec  the task was named, not handed over
    """

    limits: Mapping[str, Limit]
    options: Mapping[str, Any]
    aim: Goal | Front | None = None
    from_spec: bool = True
    clock: Clock = field(default_factory=Clock)

    @property
    def goal(self) -> Goal | None:
        return self.aim if isinstance(self.aim, Goal) else None

    @property
    def front(self) -> Front | None:
        return self.aim if isinstance(self.aim, Front) else None

    @property
    def asked(self) -> str:
        """Budgets and goal in words; a run with others is another run."""
        budgets = [f"{metric} {limit.text}" for metric, limit in self.limits.items()]
        if self.goal is not None:
            budgets.append(f"least {self.goal.minimise} with {self.goal.text.removeprefix('--')}")
        elif self.aim is not None:
            budgets.append(self.aim.text)
        return ", ".join(budgets)

    @property
    def searched(self) -> dict[str, Limit]:
        """The limits that the search works with: what is to be as little as possible is at most the original's."""
        if self.aim is None or self.aim.minimise in self.limits:
            return dict(self.limits)
        return {**self.limits, self.aim.minimise: share_of(self.aim.minimise, 1.0)}

    @property
    def schedule(self) -> Training:
        """The full distillation's."""
        return parse_training(self.options.get("training", ""), epochs=float(self.options["epochs"]))

    @property
    def recovery(self) -> str:
        """The mode of recovery."""
        return str(self.options["recovery"])

    @property
    def baselines(self) -> str:
        """How much what the search has to beat may cost: 'quick', 'full' or 'none'."""
        return str(self.options["baselines"])

    @property
    def losses(self) -> Losses:
        """What candidates are trained for."""
        return parse_losses(self.options["distillation"])


def make_settings(task: Any, **asked: Any) -> Settings:
    """The settings behind `Options`, filled in. Raises InputError for nonsense."""
    unknown = sorted(set(asked) - {field.name for field in fields(Options)})
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}: see the arguments of `compress`")
    given = asdict(Options(**asked))
    aim = parse_aim(given["max_drop"], given["min_metric"], given["front"], given["minimise"])
    limits = parse_budget(given["latency"], given["size"], given["memory"], required=aim is None)
    parse_losses(given["distillation"])
    check_mode(given["recovery"])
    parse_training(given["training"], epochs=EPOCHS)
    check_effort(given["baselines"])
    parse_students(given["students"])
    if not 0 <= given["max_failed"] <= 1:
        raise InputError(f"--max-failed {given['max_failed']:g} must be a share from 0 to 1")
    options = {
        "task": task if isinstance(task, str) else type(task.model).__name__,
        **{name: limit.text for name, limit in limits.items()},
        **{name: value for name, value in given.items() if name not in METRICS},
        "trials": given["trials"] or TRIALS,
        "epochs": EPOCHS if given["epochs"] is None else given["epochs"],
        "weights": str(given["weights"]) if given["weights"] else None,
    }
    timeout = given["timeout"]
    clock = Clock()
    if timeout:
        clock.deadline = clock.begun + timeout
    return Settings(from_spec=isinstance(task, str), limits=limits, aim=aim, options=options, clock=clock)


def default_folder(name: str, settings: Settings) -> Path:
    """runs/NAME-WHAT, where WHAT is what is asked for."""
    asked = [f"{metric}{limit.text}" for metric, limit in settings.limits.items()]
    if settings.front is not None:
        asked.append(f"front{settings.front.points}{settings.front.minimise}")
    elif settings.goal is not None:
        what = settings.goal.minimise
        asked += [settings.goal.text.strip("-"), *([what] if what != "latency" else [])]
    return Path("runs") / "-".join([name, *(a.replace("%", "pct").replace(" ", "") for a in asked)])


def effective_config(campaign: Campaign, settings: Settings) -> dict[str, Any]:
    """Everything effective: options with their defaults filled in, the schedule, the profile, the space, versions."""
    profile, space = campaign.device.profile, campaign.space
    return {
        **settings.options,
        "task_from": "name" if settings.from_spec else "object",
        "output": str(campaign.folder.path),
        "schedule": asdict(settings.schedule),
        "device": {
            "address": campaign.device.link.name,
            "file": str(profile.path),
            **profile.header.model_dump(mode="json"),
        },
        "search_space": {
            "importance": space.importance,
            "decisions": {d.name: list(d.options) for d in space.decisions},
            "fixed": dict(space.fixed),
        },
        "versions": {"automl-compress": __version__, **{name: version(name) for name in _LIBRARIES}},
    }


def reproduce(campaign: Campaign, settings: Settings) -> str:
    """How to start the same run again: a command line, or a call where the task was an object."""
    options = {k: v for k, v in settings.options.items() if v is not None and k != "task"}
    task, folder = settings.options["task"], str(campaign.folder.path)
    if not settings.from_spec:
        words = [f"{name}={value!r}" for name, value in options.items()]
        return f"compress(task, {', '.join([*words, f'output={folder!r}'])})  # task: {task}"
    if "timeout" in options:
        options["timeout"] = f"{options['timeout']:g}s"
    words = [
        word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", shlex.quote(str(value)))
    ]
    return " ".join(["automl-compress search", shlex.quote(task), *words, "-o", shlex.quote(folder)])
