"""Fuzz the codec.

Damaged payloads must raise CodecError, hostile ones too unless they decode to possible traces.

Not collected by pytest; tests/fuzz/test_fuzz_codec.py runs a little of it.

Example:
    $ python -m tests.fuzz.fuzz_codec --count 1000000
    $ python -m tests.fuzz.fuzz_codec --guided -runs=1000000 -max_len=4096
"""

from __future__ import annotations

import argparse
import collections
import inspect
import random
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

from moe_replay.errors import CodecError
from moe_replay.routing import (
    Encoding,
    Origin,
    PolicySpan,
    RoutingTrace,
    decode_traces,
    digest,
    encode_trace,
    encode_traces,
    slots,
)
from moe_replay.routing.format import codec, frame, set_coding

from ..support.payload_mutations import damaged, hostile, with_fitting_checksums

MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of a fuzzing process: a payload of kilobytes that asks for more ends it with
MemoryError."""


def main() -> None:
    """Fuzz as the arguments say and print what happened to the payloads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="payloads to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--guided",
        action="store_true",
        help="by code coverage, with atheris; other arguments are its own",
    )
    arguments, rest = parser.parse_known_args()
    if arguments.guided:
        fuzz_by_coverage([sys.argv[0], *rest], arguments.seed)
    elif rest:
        parser.error(f"unknown arguments {rest}; those of libFuzzer need --guided")
    # Sanitizers of atheris reserve more than any limit, so it has its own: -rss_limit_mb.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    start = time.perf_counter()
    outcomes = fuzz(arguments.count, arguments.seed)
    seconds = time.perf_counter() - start
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:10d} {outcome}")
    print(f"{arguments.count:10d} payloads, seed {arguments.seed}, {seconds:.0f} s: no defect")


def fuzz(count: int, seed: int) -> collections.Counter[str]:
    """Try ``count`` payloads, one damaged for each hostile one, and count what became of them."""
    rng = random.Random(seed)
    payloads = intact_payloads(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count):
        payload = rng.choice(payloads)
        alter = hostile if number % 2 else damaged
        altered = alter(payload, rng)
        try:
            outcome = outcome_of(altered, must_raise=alter is damaged)
        except BaseException:
            print(
                f"seed {seed}, payload {number}, {alter.__name__}: {altered.hex()}", file=sys.stderr
            )
            raise
        outcomes[f"{alter.__name__}, {outcome}"] += 1
    return outcomes


def outcome_of(payload: bytes, *, must_raise: bool) -> str:
    """Decode a payload and return ``refused`` or ``decoded``; all else is a defect and raises."""
    try:
        traces = decode_traces(payload)
    except CodecError:
        return "refused"
    assert not must_raise, "an altered payload was decoded although its checksums do not fit"
    for trace in traces.values():
        check_possible(trace)
    return "decoded"


def check_possible(trace: RoutingTrace) -> None:
    """Check by other means than the trace's own that its routes are sets of the model's experts."""
    held = np.sort(trace.expert_ids[trace.valid].astype(np.int64), axis=2)
    assert held.size == 0 or held.max() < trace.num_experts, "an expert outside the model"
    assert (np.diff(held, axis=2) > 0).all(), "an expert twice in a set"
    assert len(trace.valid) == len(trace.token_digest) == len(trace), "rows without flag or token"
    assert sum(span.stop - span.start for span in trace.origin.spans) == len(trace), (
        "rows of no policy"
    )


def intact_payloads(seed: int) -> list[bytes]:
    """Return small payloads of every encoding, width of ids, and number of traces."""
    rng = np.random.default_rng(seed)
    payloads = []
    for num_experts, topk, num_layers, rows in (
        *((2, 1, 1, 1), (8, 2, 2, 5), (128, 8, 3, 17), (256, 4, 2, 40)),
        *((300, 4, 2, 9), (512, 10, 1, 30), (65_536, 3, 1, 4), (64, 20, 210, 3)),
    ):
        trace = _trace(rng, num_experts, topk, num_layers, rows)
        payloads += [encode_trace(trace, encoding=encoding) for encoding in Encoding]
        payloads.append(encode_traces({"a": trace, "b/ü": trace.crop(0, rows // 2), "c": trace}))
    return [encode_traces({}), *payloads]


def fuzz_by_coverage(argv: Sequence[str], seed: int) -> None:
    """Let atheris look for payloads that reach new code, past checksums that are made to fit."""
    import atheris

    places: list[object] = [codec, frame, set_coding, slots, digest, RoutingTrace]
    for function in (value for place in places for value in vars(place).values()):
        if inspect.isfunction(function) and function.__module__.startswith("moe_replay"):
            atheris.instrument_func(function)
    payloads = intact_payloads(seed)

    def try_one(payload: bytes) -> None:
        outcome_of(payload, must_raise=False)

    def mutate(payload: bytes, max_size: int, mutation_seed: int) -> bytes:
        rng = random.Random(mutation_seed)
        if len(payload) < 48 or rng.random() < 0.05:
            payload = rng.choice(payloads)
        by_libfuzzer = rng.random() < 0.5
        altered = atheris.Mutate(payload, max_size) if by_libfuzzer else damaged(payload, rng)
        return with_fitting_checksums(altered)[:max_size]

    atheris.Setup(list(argv), try_one, custom_mutator=mutate)
    atheris.Fuzz()


def _trace(
    rng: np.random.Generator, num_experts: int, topk: int, num_layers: int, rows: int
) -> RoutingTrace:
    ids = [[rng.permutation(num_experts)[:topk] for _ in range(num_layers)] for _ in range(rows)]
    stops = sorted({(rows + 1) // 2, rows})
    return RoutingTrace.record(
        np.array(ids),
        token_ids=rng.integers(0, 200_000, rows),
        valid=rng.random(rows) < 0.8,
        layers=sorted(rng.permutation(300)[:num_layers].tolist()),
        num_experts=num_experts,
        origin=Origin(
            engine="fuzz",
            engine_version="1",
            spans=tuple(
                PolicySpan(start=start, stop=stop, policy_version=start)
                for start, stop in zip([0, *stops], stops, strict=False)
            ),
        ),
    )


if __name__ == "__main__":
    main()
