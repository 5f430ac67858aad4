"""What drift explains is told from wrong routes by the gap that replay adds."""

from dataclasses import replace

import pytest
from tests.routing.guard.test_decision import PLAIN, drawn, spoil, verdict_of

from moe_replay.routing.guard import Fault, drift_rho


def fault(**keys) -> Fault:
    plain = {"kind": "server", "name": "b", "cause": "lost", "nats": 30.0, "threshold": 20.0}
    return Fault(**{**plain, "samples": (1, 2, 3), "may_be_drift": True, **keys})


def test_drift_rho_is_the_median_of_the_faults_samples():
    # Sample 9 is of another server: it does not count.
    assert drift_rho(fault(), {1: 0.2, 2: 0.4, 3: 3.0, 9: 9.0}) == 0.4


def test_drift_rho_of_the_step_is_that_of_all_samples():
    assert drift_rho(fault(kind="step", name="", samples=()), {1: 0.2, 9: 0.4}) == pytest.approx(
        0.3
    )


@pytest.mark.parametrize(
    ("keys", "rho"),
    [
        pytest.param({}, {1: 2.0, 2: 2.5, 3: 0.1}, id="replay raises the gap of two of three"),
        pytest.param({"may_be_drift": False}, {1: 0.0, 2: 0.0}, id="another place fits better"),
        pytest.param({}, {9: 0.0}, id="none of its samples was scored"),
        pytest.param({}, {}, id="no sample was scored"),
    ],
)
def test_drift_rho_does_not_excuse_other_faults(keys, rho):
    assert drift_rho(fault(**keys), rho) is None


def test_verdict_without_drops_one_of_two_servers_alone():
    rng, recorded, live = drawn(PLAIN, seed=3)
    verdict = verdict_of(PLAIN, spoil(PLAIN, rng, recorded, "one row late", [4]), live)
    both = replace(
        verdict, faults=(fault(), fault(name="c"), fault(kind="rank", may_be_drift=False))
    )
    left = both.without({("server", "b"), ("rank", "b")})
    assert [(each.kind, each.name) for each in left.faults] == [("server", "c"), ("rank", "b")]
    assert left.findings == verdict.findings != ()
