"""The surrogate: what it learns about single options from losses of whole plans."""

import numpy as np

from automl_compress.search.sampling.surrogate import Options, Surrogate

_DECISIONS, _OPTIONS = 12, 3


def _options(losses):
    """Twelve decisions with three options each, the first of which changes nothing; two kinds."""
    decision = np.repeat(np.arange(_DECISIONS, dtype=float), _OPTIONS)
    kind = (decision >= _DECISIONS / 2).astype(np.int64)
    return Options(losses, decision, kind, np.arange(len(losses)) % _OPTIONS == 0)


def _plans(rng, count):
    chosen = rng.integers(_OPTIONS, size=(count, _DECISIONS))
    return np.eye(_OPTIONS)[chosen].reshape(count, -1)


def _table(rng):
    """What options lose, and what a table wrongly says that they do: one kind three times too harmless, all with
    deviations of a half."""
    losses = np.exp(rng.normal(size=_DECISIONS * _OPTIONS))
    losses[::_OPTIONS] = 0.0
    believed = losses * np.exp(rng.normal(0.0, 0.5, len(losses)))
    believed[len(losses) // 2 :] /= 3.0
    return losses, believed


def test_exact_sums_of_losses_tell_plans_that_were_not_tried():
    rng = np.random.default_rng(0)
    losses, believed = _table(rng)
    tried, others = _plans(rng, 40), _plans(rng, 50)  # 24 unknown losses
    surrogate = Surrogate(_options(believed), tried, tried @ losses)
    mean, deviation = surrogate.predict(others)
    wanted = surrogate.transform(others @ losses)
    assert np.abs(mean - wanted).max() < 0.02 * np.ptp(wanted)
    assert (np.abs(mean - wanted) < 4 * deviation + 0.02 * np.ptp(wanted)).all()


def test_a_kind_of_options_that_is_worse_than_the_table_says_is_found_out_by_few_trials():
    rng = np.random.default_rng(1)
    losses, believed = _table(rng)
    tried = _plans(rng, 10)
    learned = Surrogate(_options(believed), tried, tried @ losses).learned
    half = len(losses) // 2
    before = believed[half:].sum() / believed[:half].sum()
    after = learned[half:].sum() / learned[:half].sum()
    wanted = losses[half:].sum() / losses[:half].sum()
    assert abs(np.log(after / wanted)) < 0.5 * abs(np.log(before / wanted))


def test_draws_scatter_around_what_was_learned():
    rng = np.random.default_rng(2)
    losses, believed = _table(rng)
    tried = _plans(rng, 10)
    surrogate = Surrogate(_options(believed), tried, tried @ losses + rng.normal(0.0, 0.1, 10))
    drawn = surrogate.drawn(np.random.default_rng(3), 200)
    assert drawn.shape == (200, len(losses))
    assert (drawn >= 0).all()
    neutral = _options(believed).neutral
    assert np.allclose(drawn[:, neutral], 0.0)
    spread = drawn.std(axis=0)[~neutral]
    assert (spread > 0).all()
    off = np.abs(drawn.mean(axis=0) - surrogate.learned)[~neutral]
    assert np.median(off / spread) < 0.5


def test_where_losses_explode_the_order_of_good_plans_is_still_told():
    rng = np.random.default_rng(4)
    losses, believed = _table(rng)
    tried, others = _plans(rng, 60), _plans(rng, 60)
    broken = np.exp(0.5 * tried @ losses)
    surrogate = Surrogate(_options(believed), tried, broken)
    mean, _ = surrogate.predict(others)
    assert np.isfinite(mean).all()
    assert np.corrcoef(np.argsort(np.argsort(mean)), np.argsort(np.argsort(others @ losses)))[0, 1] > 0.7
