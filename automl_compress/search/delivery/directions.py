"""The best model within budgets. What all directions share: a finished model is verified, or the search goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from automl_compress.errors import CompressError, ExportError
from automl_compress.search.campaign.baselines import Baselines, beside_own
from automl_compress.search.campaign.campaign import Campaign
from automl_compress.search.campaign.settings import Settings
from automl_compress.search.delivery.deliver import Verified, verify
from automl_compress.search.evaluation.candidate import Candidate
from automl_compress.search.ladder.climb import Climber, within_budget
from automl_compress.search.ladder.contenders import Contenders
from automl_compress.search.ladder.finalists import finalists

Found = tuple[Candidate, Verified, Baselines]
DELIVERIES = 4


def best_model(campaign: Campaign, settings: Settings) -> Found:
    """Search, recover, verify; a miss corrects the cost model, and the search goes on.

    Raises InfeasibleError where nothing was found that meets the budget.
    """
    trials, climber = int(settings.options["trials"]), Climber(campaign, settings)
    contenders = Contenders(campaign, settings)
    for attempt in range(DELIVERIES):
        beside = climber.beside(campaign)
        allotment = climber.allot(campaign.trials_left(trials + attempt), baselines=beside)
        plans = finalists(campaign, trials + attempt, allotment.exploring, places=allotment.rungs[0].models)
        allotment = climber.allot(0, baselines=beside)
        finished = climber.climb(campaign, plans, allotment)
        beaten = climber.compare(campaign, allotment)
        others = contenders.finished(finished)
        models = [finished, *within_budget(campaign, beaten.trained), *others]
        best = max(models, key=lambda candidate: candidate.metric)
        verified = verified_or_rejected(campaign, best, beaten.candidates)
        if verified is not None:
            verified = replace(verified, notes=(*verified.notes, *contenders.told))
            return best, verified, beside_own(beaten, campaign, best, finished)
        contenders.reject(best)
    raise none_left(campaign, DELIVERIES)


def verified_or_rejected(campaign: Campaign, candidate: Candidate, beaten: Mapping[str, Candidate]) -> Verified | None:
    """A finished model's figures if it is sound and within the budget; else None, and the search knows why."""
    key = candidate.plan.key if candidate.width is None else f"student({candidate.width:g})"
    try:
        verified = verify(campaign, candidate, beaten)
    except ExportError as error:
        campaign.rejected[key] = str(error)
        campaign.progress.note(f"a finished model was rejected ({error}); the search goes on")
        return None
    if verified.met:
        return verified
    campaign.progress.note("the finished model missed the budget; the search goes on")
    if candidate.width is None:
        campaign.measured.remember(candidate.plan, verified.beside(campaign.original))
    return None


def none_left(campaign: Campaign, count: int) -> CompressError:
    """What to raise after so many finished models, none of which could be delivered."""
    if campaign.rejected:
        reason = next(reversed(campaign.rejected.values()))
        return ExportError(f"{len(campaign.rejected)} finished models were rejected, the last one because: {reason}")
    return campaign.infeasible(f"{count} finished models missed the budget when measured")
