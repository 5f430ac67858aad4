"""Traces of every form that the codec must carry, for hypothesis."""

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from moe_replay.routing import Origin, PolicySpan, RoutingTrace, expert_dtype

EXPERTS = (2, 3, 8, 128, 255, 256, 257, 384, 512, 4096, 65_535, 65_536)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def traces(draw) -> Callable[[], RoutingTrace]:
    """Draw a function that makes a trace, whose invalid rows hold what no router chooses.

    Making it checks annotations, which looks at items of sequences at random; hypothesis allows
    that outside a strategy.
    """
    num_experts = draw(st.sampled_from(EXPERTS) | st.integers(2, 65_536))
    topk = draw(st.integers(1, min(num_experts - 1, 12)) | st.just(min(num_experts - 1, 70)))
    layers = draw(st.lists(st.integers(0, 300), min_size=1, max_size=5, unique=True).map(sorted))
    valid = draw(st.lists(st.booleans(), max_size=20))
    stops = sorted(draw(st.sets(st.integers(1, max(1, len(valid) - 1)), max_size=3)))
    stops = [stop for stop in stops if stop < len(valid)] + [len(valid)] * bool(valid)
    versions = [draw(st.integers(-(2**63), 2**63 - 1)) for _ in stops]
    names = draw(NAMES), draw(NAMES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.full((len(valid), len(layers), topk), np.iinfo(expert_dtype(num_experts)).max)
    for row in np.flatnonzero(valid):
        for layer in range(len(layers)):
            ids[row, layer] = rng.choice(num_experts, topk, replace=False)
    token_ids = rng.integers(0, 1 << draw(st.sampled_from([4, 17, 32, 62])), len(valid))

    def make() -> RoutingTrace:
        spans = (
            PolicySpan(start=start, stop=stop, policy_version=version)
            for start, stop, version in zip([0, *stops][: len(stops)], stops, versions, strict=True)
        )
        return RoutingTrace.record(
            ids,
            token_ids=token_ids,
            valid=np.array(valid, dtype=bool),
            layers=layers,
            num_experts=num_experts,
            origin=Origin(engine=names[0], engine_version=names[1], spans=tuple(spans)),
        )

    return make


def facts(trace: RoutingTrace) -> dict:
    """Return everything about a trace but its routes."""
    return {
        "shape": trace.expert_ids.shape,
        "dtype": trace.expert_ids.dtype,
        "valid": trace.valid.tolist(),
        "layers": trace.layers,
        "num_experts": trace.num_experts,
        "token_digest": trace.token_digest.tolist(),
        "origin": trace.origin,
    }


def sets(trace: RoutingTrace) -> list[list[frozenset[int]]]:
    """Return the set of experts of each valid row and layer."""
    return [[frozenset(k) for k in row] for row in trace.expert_ids[trace.valid].tolist()]
