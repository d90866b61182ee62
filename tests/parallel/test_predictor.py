"""The predictor finds domains and features that explain cost, and falls back where they do not."""

import json

import numpy as np

from megaboat.parallel.balance.predictor import FEATURES, MIN_R2, CostPredictor, features_of

MEANS = np.array([0.3, 0.5, 0.7])


def windows(count: int, seed: int, slope: float, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Domains, features and costs; inside a domain the first two features explain `slope` of the cost."""
    generator = np.random.default_rng(seed)
    domains_N = generator.integers(0, 3, count)
    features_NF = generator.normal(0.5, 0.1, (count, FEATURES))
    inside_N = slope * (features_NF[:, 0] - features_NF[:, 1]) + noise * generator.normal(size=count)
    return domains_N, features_NF, MEANS[domains_N] * (1 + inside_N)


def trained(slope: float, noise: float) -> CostPredictor:
    predictor = CostPredictor(3)
    for step in range(40):
        predictor.update(*windows(32, step, slope, noise))
    return predictor


def test_recovers_the_means_of_domains() -> None:
    predictor = trained(0.0, 0.05)
    found = predictor.predict(np.arange(3), np.full((3, FEATURES), 0.5))
    np.testing.assert_allclose(found, MEANS, rtol=0.03)


def test_r2_is_near_the_truth() -> None:
    slope, noise = 0.5, 0.05
    explained = 2 * (slope * 0.1) ** 2
    truth = explained / (explained + noise**2)
    assert 0.9 * truth <= trained(slope, noise).r2 <= 1.1 * truth


def test_falls_back_to_the_domain_where_features_say_nothing() -> None:
    predictor = trained(0.0, 0.1)
    assert predictor.r2 < MIN_R2
    domains_N, features_NF, _ = windows(50, 999, 0.0, 0.1)
    costs_N = predictor.predict(domains_N, features_NF)
    assert len(np.unique(costs_N)) == 3


def test_before_anything_was_learned_all_windows_are_alike() -> None:
    assert CostPredictor(3).predict(np.array([0, 2]), np.ones((2, FEATURES))).tolist() == [1, 1]


def test_an_unseen_domain_is_like_all_others_together() -> None:
    predictor = CostPredictor(3)
    predictor.update(np.array([0, 1]), np.ones((2, FEATURES)), np.array([0.2, 0.4]))
    assert predictor.predict(np.array([2]), np.ones((1, FEATURES)))[0] == np.float64(0.2 + 0.4) / 2


def test_goes_on_exactly_from_a_checkpoint() -> None:
    predictor, again = trained(0.5, 0.05), CostPredictor(3)
    again.load(json.loads(json.dumps(predictor.state())))
    for one in (predictor, again):
        one.update(*windows(32, 777, 0.5, 0.05))
    domains_N, features_NF, _ = windows(50, 999, 0.5, 0.05)
    assert np.array_equal(predictor.predict(domains_N, features_NF), again.predict(domains_N, features_NF))


def test_features_tell_windows_apart() -> None:
    varied, repeated = np.arange(100), np.arange(100) % 5
    found_NF = features_of(np.stack([varied, repeated, varied]), np.array([1, 1, 9]))
    assert found_NF[:, :2].tolist() == [[1.0, 0.99], [0.05, 0.05], [1.0, 0.99]]
    assert found_NF[0, 2] > found_NF[1, 2]
    assert found_NF[2, 3] > found_NF[0, 3]
