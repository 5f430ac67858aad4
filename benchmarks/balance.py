"""How long the slowest replica computes, in units of the mean, with samples dealt or kept.

A simulation of the work alone, by the function that deals in training: lognormal lengths (sigma
0.8, median 4,096, at most 32,768 tokens), 16 samples for each of 8 and of 64 replicas, work by the
shape of Qwen3-30B-A3B. `balance.slowest_ratio` is the worse of the two means over mini-batches.

    python benchmarks/balance.py [--quick]
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from moe_replay.batch.balance import deal, work_of

EVEN_LENGTH = 15_500
"""Tokens at which attention costs as much as the 3.04e9 weights of a token: 48 layers, 32 heads of
128."""
PER_REPLICA, CAP, SEED = 16, 32_768, 7


def ratios(replicas: int, minibatches: int) -> dict[str, float]:
    """Return slowest / mean for each way to give samples to replicas, mean over mini-batches."""
    rng = np.random.default_rng([SEED, replicas])
    found: dict[str, list[float]] = {"by position": [], "dealt": [], "dealt, tokens": []}
    for _ in range(minibatches):
        draw = rng.lognormal(np.log(4096), 0.8, PER_REPLICA * replicas)
        lengths = [min(int(n) + 1, CAP) for n in draw]
        work = [work_of(n, EVEN_LENGTH) for n in lengths]
        kept = [list(range(n, n + PER_REPLICA)) for n in range(0, len(work), PER_REPLICA)]
        dealt = deal(work, replicas)
        assert dealt is not None
        for name, parts, unit in (
            ("by position", kept, work),
            ("dealt", dealt, work),
            ("dealt, tokens", dealt, lengths),
        ):
            loads = [sum(unit[p] for p in part) for part in parts]
            found[name].append(max(loads) * replicas / sum(loads))
    return {name: float(np.mean(values)) for name, values in found.items()}


def main() -> None:
    """Print the table, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 mini-batches in place of 400")
    number = 20 if parser.parse_args().quick else 400
    table = {replicas: ratios(replicas, number) for replicas in (8, 64)}
    print(f"seed {SEED}, {number} mini-batches, slowest / mean of the work:")
    for replicas, row in table.items():
        print(f"  {replicas:3} replicas  " + "  ".join(f"{n} {v:.3f}" for n, v in row.items()))
    for metric, name in (
        ("balance.by_position_ratio", "by position"),
        ("balance.slowest_ratio", "dealt"),
    ):
        value = max(row[name] for row in table.values())
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": "ratio"}))


if __name__ == "__main__":
    main()
