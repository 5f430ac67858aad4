"""Measure the routing core: the codec beside other forms, cutting and sharing beside a plain copy.

Example:
    $ python benchmarks/routing.py --quick
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_replay.routing import (
    Encoding,
    Origin,
    RouteSlice,
    RoutingTrace,
    RowIndex,
    TraceFile,
    decode_trace,
    encode_trace,
    slice_routes,
    write_trace_file,
)

NUM_LAYERS, TOPK, NUM_EXPERTS = 48, 8, 128
VOCABULARY = 151_936


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    metric: str
    """Name under which it is tracked."""
    value: float
    """The number."""
    unit: str
    """Its unit."""


def main() -> None:
    """Run every benchmark and print one JSON line a figure at the end."""
    arguments = _arguments()
    # Each in a process of its own: what one frees changes how the allocator serves the next.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        runs = [
            processes.submit(_figures_of, number, arguments) for number in range(len(BENCHMARKS))
        ]
        figures = [figure for run in runs for figure in run.result()]
    for figure in figures:
        print(f"{figure.metric:32s} {figure.value:12.3f} {figure.unit}")
    for figure in figures:
        value = round(figure.value, 4)
        print(json.dumps({"metric": figure.metric, "value": value, "unit": figure.unit}))


def _figures_of(number: int, arguments: argparse.Namespace) -> list[Figure]:
    return list(BENCHMARKS[number](arguments))


def measure_codec(arguments: argparse.Namespace) -> Iterable[Figure]:
    """Yield size, speed and memory of the codec, on routes that no code can shrink: even draws."""
    rng = np.random.default_rng(0)
    trace = _trace(rng, _even_routes(rng, arguments.rows))
    raw_bytes = trace.expert_ids.nbytes
    payload = encode_trace(trace)
    per_token = len(payload) / len(trace)
    yield Figure(metric="codec.compact_ratio", value=len(payload) / raw_bytes, unit="ratio")
    yield Figure(metric="codec.compact_bytes_per_token", value=per_token, unit="B")
    unrouted = replace(trace, valid=np.zeros_like(trace.valid))  # header, flags and tokens remain
    binding = len(encode_trace(unrouted)) / len(trace)
    yield Figure(metric="codec.binding_bytes_per_token", value=binding, unit="B")
    for encoding in (Encoding.ORDERED, Encoding.RAW):
        ratio = len(encode_trace(trace, encoding=encoding)) / raw_bytes
        yield Figure(metric=f"codec.{encoding.value}_ratio", value=ratio, unit="ratio")
    skewed = _trace(rng, _skewed_routes(rng, arguments.rows))
    ratio = len(encode_trace(skewed)) / raw_bytes
    yield Figure(metric="codec.compact_ratio_skewed", value=ratio, unit="ratio")
    yield from _speeds(trace, payload, arguments.rounds)
    yield from _memory(trace)
    yield from _other_forms(trace, len(payload))


def measure_rows(arguments: argparse.Namespace) -> Iterable[Figure]:
    """Yield the time to cut a batch for 32 ranks, row indices included, over a copy of its routes.

    The batch has sequences of 1,000 to 4,000 tokens. Slices are new memory, and so is the copy; a
    second figure compares with a copy into memory that is already there.
    """
    rng = np.random.default_rng(0)
    pool = _even_routes(rng, 8192)
    lengths: list[int] = []
    while sum(lengths) < arguments.batch_rows:
        lengths.append(int(rng.integers(1000, 4001)))
    traces = [
        _trace(rng, pool[(rng.integers(0, 4192) + np.arange(length)) % len(pool)])
        for length in lengths
    ]
    whole = np.concatenate([trace.expert_ids for trace in traces])
    place = np.empty_like(whole)
    contestants: dict[str, Callable[[], object]] = {
        "cut": lambda: _cut_for_all_ranks(traces, lengths),
        "copy": whole.copy,
        "copy into place": lambda: np.copyto(place, whole),
    }
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(arguments.rounds // 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            held = run()
            best[name] = min(best[name], time.perf_counter() - start)
            del held
    cut_bytes = sum(part.expert_ids.nbytes for part in _cut_for_all_ranks(traces, lengths))
    yield Figure(metric="rows.memcpy_ratio", value=best["cut"] / best["copy"], unit="ratio")
    ratio = best["cut"] / best["copy into place"]
    yield Figure(metric="rows.memcpy_ratio_into_place", value=ratio, unit="ratio")
    yield Figure(metric="rows.cut_MBps", value=whole.nbytes / best["cut"] / 1e6, unit="MB/s")
    yield Figure(metric="rows.bytes_ratio", value=cut_bytes / whole.nbytes, unit="ratio")


def _cut_for_all_ranks(traces: list[RoutingTrace], lengths: list[int]) -> list[RouteSlice]:
    """Return the slices of 4 context, 2 sequence and 4 pipeline ranks: together the batch, once."""
    slices = []
    for cp_rank in range(4):
        index = RowIndex.packed(lengths, cp_size=4, cp_rank=cp_rank, pad_multiple=2)
        for tp_rank in range(2):
            rows = index.sequence_shard(2, tp_rank)
            size = NUM_LAYERS // 4
            slices += [
                slice_routes(traces, rows, layers=range(s * size, (s + 1) * size)) for s in range(4)
            ]
    return slices


def measure_sharing(arguments: argparse.Namespace) -> Iterable[Figure]:
    """Yield what it takes four ranks of a replica (context 2, pipeline 2) to share a step's routes.

    The peak is of resident memory beside the traces that a rank holds before, over the bytes of
    these; what it then keeps is as large as they were.
    """
    from moe_replay.testing.ranks import run_ranks

    ranks = run_ranks(_share, 4, arguments.shared_samples)
    yield Figure(metric="sharing.extra_peak_ratio", value=max(r[0] for r in ranks), unit="ratio")
    yield Figure(metric="sharing.rank_MBps", value=min(r[1] for r in ranks), unit="MB/s")


def _share(num_samples: int) -> tuple[float, float]:
    """Share samples of 8,192 tokens, 2 a microbatch; return this rank's peak and MB/s of routes."""
    import torch.distributed as dist

    from moe_replay.batch import RankPlace, Sample, build_microbatch
    from moe_replay.megatron.ranks.messages import HostGroup, all_ranks
    from moe_replay.megatron.ranks.replica import Peer, Replica
    from moe_replay.megatron.ranks.sharing import share_routes

    own, half = dist.get_rank(), NUM_LAYERS // 2
    peers = tuple(
        Peer(
            place=RankPlace(cp_size=2, cp_rank=rank % 2),
            layers=tuple(range(rank // 2 * half, (rank // 2 + 1) * half)),
        )
        for rank in range(4)
    )
    replica = Replica(
        number=0,
        num_replicas=1,
        peers=peers,
        own=own,
        computes_loss=True,
        is_last_stage=own >= 2,
        ranks=all_ranks(),
        siblings=HostGroup(group=None, name="ranks of place 0"),
    )
    rng = np.random.default_rng(own)
    ids = _even_routes(rng, 8192)
    # Every rank knows the tokens of every sample; `_trace` draws the same ones from the same seed.
    traces = {
        number: _trace(np.random.default_rng(number), np.roll(ids, number, axis=0))
        for number in range(own, num_samples, 4)
    }
    samples = [
        Sample(
            sample_id=number,
            token_ids=np.random.default_rng(number)
            .integers(0, VOCABULARY, len(ids))
            .astype(np.int32),
            prompt_length=1,
            rollout_logprobs=np.zeros(len(ids) - 1, dtype=np.float32),
            advantage=1.0,
            trains=True,
        )
        for number in range(num_samples)
    ]
    microbatches = [
        build_microbatch(start // 2, samples[start : start + 2], place=peers[own].place)
        for start in range(0, num_samples, 2)
    ]
    held_bytes = sum(trace.expert_ids.nbytes for trace in traces.values())
    all_ranks().barrier()
    # Linux counts the peak of resident memory from here on.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _resident_bytes("VmRSS"), time.perf_counter()
    shared = share_routes(replica, microbatches, traces)
    seconds = time.perf_counter() - start
    peak = _resident_bytes("VmHWM") - before
    assert sum(routes.valid.sum() for routes in shared.values())
    return peak / held_bytes, held_bytes / seconds / 1e6


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


BENCHMARKS: tuple[Callable[[argparse.Namespace], Iterable[Figure]], ...] = (
    measure_codec,
    measure_rows,
    measure_sharing,
)
"""Every benchmark of this file; each yields its figures."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--rows", type=int, default=65_536, help="tokens of the measured trace")
    parser.add_argument("--batch-rows", type=int, default=1_000_000, help="tokens of the cut batch")
    parser.add_argument(
        "--shared-samples", type=int, default=256, help="samples of 8,192 tokens that ranks share"
    )
    arguments = parser.parse_args()
    arguments.rounds = 8 if arguments.quick else 40
    return arguments


def _even_routes(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Return ``[rows, layers, topk]``, every set of experts as likely as any other."""
    return _topk(lambda shape: rng.random(shape, dtype=np.float32), rows)


def _skewed_routes(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Return routes as uneven as a trained router's on one domain: Zipf with exponent 1."""
    popularity = -np.log(np.arange(1, NUM_EXPERTS + 1, dtype=np.float32))
    by_layer = np.stack([rng.permutation(popularity) for _ in range(NUM_LAYERS)])

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.random(shape, dtype=np.float32)
        return by_layer - np.log(-np.log(np.maximum(noise, 1e-30)))

    return _topk(draw, rows)


def _topk(draw: Callable[[tuple[int, ...]], np.ndarray], rows: int) -> np.ndarray:
    ids = np.empty((rows, NUM_LAYERS, TOPK), dtype=np.uint8)
    for start in range(0, rows, 1024):
        part = ids[start : start + 1024]
        scores = draw((len(part), NUM_LAYERS, NUM_EXPERTS))
        part[:] = np.argpartition(scores, -TOPK, axis=2)[..., -TOPK:]
    return ids


def _trace(rng: np.random.Generator, ids: np.ndarray) -> RoutingTrace:
    return RoutingTrace.record(
        ids,
        token_ids=rng.integers(0, VOCABULARY, len(ids)),
        valid=np.arange(len(ids)) < len(ids) - 1,
        layers=range(NUM_LAYERS),
        num_experts=NUM_EXPERTS,
        origin=Origin.single(
            engine="benchmark", engine_version="1", policy_version=0, num_rows=len(ids)
        ),
    )


def _speeds(trace: RoutingTrace, payload: bytes, rounds: int) -> Iterable[Figure]:
    raw_payload = encode_trace(trace, encoding=Encoding.RAW)
    contestants = {
        "codec.encode_MBps": lambda: encode_trace(trace),
        "codec.decode_MBps": lambda: decode_trace(payload),
        "codec.raw_encode_MBps": lambda: encode_trace(trace, encoding=Encoding.RAW),
        "codec.raw_decode_MBps": lambda: decode_trace(raw_payload),
    }
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):  # in turns, so that a busy machine slows all alike
        for metric, run in contestants.items():
            start = time.perf_counter()
            run()
            best[metric] = min(best[metric], time.perf_counter() - start)
    for metric, seconds in best.items():
        yield Figure(metric=metric, value=trace.expert_ids.nbytes / seconds / 1e6, unit="MB/s")


def _memory(trace: RoutingTrace) -> Iterable[Figure]:
    """Yield peaks over the bytes of raw routes; the metric says where held ones are included."""
    raw_bytes = trace.expert_ids.nbytes
    payload = encode_trace(trace)
    encoding, decoding = _peak(lambda: encode_trace(trace)), _peak(lambda: decode_trace(payload))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step.traces"
        writing = raw_bytes + _peak(lambda: write_trace_file(path, [("trace", trace)]))
        reading = _peak(lambda: TraceFile(path).read("trace"))
    peaks = {
        "codec.peak_memory_ratio": max(encoding, decoding, writing, reading),
        "codec.encode_peak_ratio": encoding,
        "codec.decode_peak_ratio": decoding,
        "codec.decode_peak_ratio_payload_held": decoding + len(payload),
        "codec.write_file_peak_ratio_trace_held": writing,
        "codec.read_file_peak_ratio": reading,
    }
    for metric, peak in peaks.items():
        yield Figure(metric=metric, value=peak / raw_bytes, unit="ratio")


def _peak(run: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once while ``run`` ran, its result included."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del result
    return peak


def _other_forms(trace: RoutingTrace, payload_bytes: int) -> Iterable[Figure]:
    """Yield our payload, with all that binds it to its tokens, over other forms of bare routes."""
    ids = trace.expert_ids[:1024]
    share = len(trace) / len(ids)
    forms = {
        "codec.vs_int16_ratio": ids.astype(np.int16).nbytes,
        "codec.vs_int32_base64_ratio": len(base64.b64encode(ids.astype(np.int32))),
        "codec.vs_json_lists_ratio": len(json.dumps(ids.tolist(), separators=(",", ":"))),
    }
    for metric, form_bytes in forms.items():
        yield Figure(metric=metric, value=payload_bytes / (form_bytes * share), unit="ratio")


if __name__ == "__main__":
    main()
