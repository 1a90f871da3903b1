"""How many trials a cluster holds at once: what fits node by node, so that none waits for workers for ever."""

from __future__ import annotations

import pytest

from tests.train.test_step import changed
from vmoco.presets import PRESETS

TINY = PRESETS["tiny"][1]


@pytest.mark.parametrize(
    ("scaling", "evaluation_cpus", "nodes", "expected"),
    [
        ({"num_workers": 2}, 0, [2], 1),
        ({"num_workers": 2}, 0, [8], 4),
        ({"num_workers": 2}, 1, [8], 2),
        ({"num_workers": 2, "cpus_per_worker": 3}, 0, [4, 4, 4], 1),
        ({"num_workers": 2, "min_workers": 1}, 0, [1], 1),
        ({"num_workers": 2, "wait_for_nodes": True}, 0, [], 1),
    ],
)
def test_trials_at_once(scaling: dict[str, object], evaluation_cpus: int, nodes: list[int], expected: int) -> None:
    """Workers and evaluation each fit a node; elastic trials and those that wait for nodes get their turn alone."""
    from vmoco.cluster.reservation import capacity

    settings = changed(TINY, scaling=scaling, evaluation={"num_cpus": evaluation_cpus})
    assert capacity([settings], [{"CPU": float(cpus)} for cpus in nodes]) == expected


def test_a_trial_that_fits_nowhere_is_refused() -> None:
    """Four cores on one node are asked for, and there are two and two."""
    from vmoco.cluster.reservation import capacity

    settings = changed(TINY, scaling={"cpus_per_worker": 4})
    with pytest.raises(ValueError, match="a run of 1 workers, which need 4 CPU each"):
        capacity([settings], [{"CPU": 2.0}, {"CPU": 2.0}])
