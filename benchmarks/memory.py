"""Memory of log-probabilities and of a push, and time of the former, beside simpler ways.

Log-probabilities in chunks are compared with those from whole logits: an output layer of
Megatron-Core with random weights, one thread, alternating rounds. Memory is the highest sum of what
torch handed out while a pass ran: inputs are excluded, the gradient of the weight, which both ways
hold, is included. The figures come last, one JSON object a line.

    python benchmarks/memory.py [--quick]

`logits.peak_chunks` is the peak of scoring (log-probabilities and entropies) and
`logits.update_peak_chunks` that of a forward and backward pass, in float32 tensors of chunk x
vocabulary; those of whole logits, in tensors of tokens x vocabulary, are printed beside them.
`logits.time_ratio` is chunks over whole logits, of a scoring pass and an update together, in
processor time.
`push.peak_ratio` is what the weights and a push of them hold at the peak, over the weights: one
parameter of a layer and two parts of the push more, where a plan that held its tensors came to 2.
`plan.byte_error_frac` is how far the formulas of `moe-replay doctor --plan` are off at worst, over
small models and layouts: of weights, gradients and optimizer state, and of the peaks of an update
and of scoring beyond these. The constants are the CPU's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import alternate
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig

from moe_replay.engines.servers.push_files import WeightsFolder, weight_parts
from moe_replay.megatron.layout import ParallelLayout, initialize, shutdown
from moe_replay.megatron.logprobs import token_statistics
from moe_replay.megatron.weights import WeightExport
from moe_replay.testing.memory import peak_bytes
from moe_replay.testing.planned import CASES, compare
from moe_replay.testing.policies import start_policy
from moe_replay.testing.tiny_models import write_tiny_checkpoint

TEMPERATURE = 0.7
_FLOAT_BYTES = 4
QUICK_CASES = ("plain", "full recompute", "latent attention", "adapters")


class OutputLayer:
    """The last layer of a model, and the hidden rows that come in."""

    def __init__(self, *, tokens: int, vocab: int, hidden: int, chunk: int) -> None:
        torch.manual_seed(0)
        self.tokens, self.vocab, self.chunk = tokens, vocab, chunk
        config = TransformerConfig(num_layers=1, hidden_size=hidden, num_attention_heads=1)
        self.layer = ColumnParallelLinear(
            hidden,
            vocab,
            config=config,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=hidden**-0.5),
            bias=False,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.model: Any = SimpleNamespace(
            post_process=True,
            pre_process=False,
            share_embeddings_and_output_weights=False,
            config=config,
            output_layer=self.layer,
        )
        self.hidden = torch.randn(tokens, 1, hidden, requires_grad=True)
        self.ids = torch.randint(vocab, (tokens,))
        self.weights = torch.randn(tokens)

    def chunked(self, *, with_entropies: bool) -> torch.Tensor:
        """Return ``[tokens, 1 or 2]`` as training computes it."""
        with token_statistics(
            self.model,
            torch.arange(self.tokens),
            self.ids,
            temperature=TEMPERATURE,
            with_entropies=with_entropies,
            chunk_rows=self.chunk,
        ):
            return self.layer(self.hidden)[0][:, 0]

    def whole(self, *, with_entropies: bool) -> torch.Tensor:
        """Return the same by Megatron's cross entropy, and a softmax, over all logits."""
        logits = self.layer(self.hidden)[0][:, 0]
        # The cross entropy works in place.
        scaled = (logits / TEMPERATURE).unsqueeze(1)
        logprobs = -vocab_parallel_cross_entropy(scaled, self.ids.unsqueeze(1)).squeeze(1)
        if not with_entropies:
            return logprobs[:, None]
        shifted = logits / TEMPERATURE
        shifted = shifted - shifted.amax(dim=-1, keepdim=True)
        shares = shifted.exp()
        total = shares.sum(dim=-1)
        entropies = total.log() - (shares * shifted).sum(dim=-1) / total
        return torch.stack([logprobs, entropies], dim=-1)

    def score(self, way: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Run the pass that computes old log-probabilities."""
        with torch.no_grad():
            return way(with_entropies=True)

    def update(self, way: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run a forward and a backward pass."""
        loss = way(with_entropies=False)[:, 0] @ self.weights
        return torch.autograd.grad(loss, (self.hidden, self.layer.weight))


def push_ratio() -> float:
    """Return the peak of planning an export and sending it, weights included, over the weights.

    Parts hold a 64th of the weights (512 MiB of the 61 GB of Qwen3-30B-A3B are a 113th), and one is
    with the servers while the next is made.
    """
    shutdown()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny_checkpoint(
            Path(folder) / "model", num_hidden_layers=24, num_experts=16, hidden_size=128
        )
        actor = start_policy(checkpoint)

    weights = sum(p.nbytes for module in actor.modules for p in module.parameters())

    def export() -> None:
        tensors = WeightExport(actor.modules).tensors()
        folder = WeightsFolder(None)
        sent: Any = None
        with weight_parts(tensors, folder=folder, push="p", bucket_bytes=weights // 64) as parts:
            for part in parts:
                sent = part
        del sent

    return (weights + peak_bytes(export)) / weights


def plan_error(names: Iterable[str]) -> float:
    """Return the largest relative error of the plan over cases, and print each."""
    worst = 0.0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(Path(folder), CASES[name])
        worst = max(worst, *(abs(row.error_frac) for row in rows))
        peaks = (
            f"{row.what} {row.measured / 2**20:.1f} MiB {row.error_frac:+.1%}"
            for row in rows
            if row.what in ("update", "scoring")
        )
        print(f"plan, {name}: {', '.join(peaks)}")
    return worst


def main() -> None:
    """Print what was measured, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="half of the tokens, fewer pairs and cases"
    )
    parser.add_argument("--pairs", type=int, help="default 9, quick 3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # First: its processes are forks, and must not inherit process groups.
    error = plan_error(QUICK_CASES if options.quick else CASES)
    initialize(ParallelLayout())
    tokens, pairs = (1024, options.pairs or 3) if options.quick else (2048, options.pairs or 9)
    layer = OutputLayer(tokens=tokens, vocab=32768, hidden=256, chunk=tokens // 4)
    for pass_ in (layer.score, layer.update):
        for found, expected in zip(pass_(layer.chunked), pass_(layer.whole), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    unit = layer.vocab * _FLOAT_BYTES
    peaks = {
        name: [peak_bytes(partial(pass_, way)) for way in (layer.chunked, layer.whole)]
        for name, pass_ in (("score", layer.score), ("update", layer.update))
    }
    for name, (chunked, whole) in peaks.items():
        print(
            f"{name}: {chunked / 2**20:.0f} MiB in chunks of {layer.chunk} rows, {whole / 2**20:.0f} MiB with whole logits, "
            f"which are {whole / unit / tokens:.2f} of them"
        )

    def step(way: Callable[..., torch.Tensor]) -> None:
        layer.score(way)
        layer.update(way)

    contest = alternate(
        lambda: step(layer.whole),
        lambda: step(layer.chunked),
        pairs=pairs,
        clock=time.process_time,
    )
    print(contest.describe("whole", "chunks"))
    for metric, value, what in (
        ("logits.peak_chunks", peaks["score"][0] / unit / layer.chunk, "chunks"),
        ("logits.update_peak_chunks", peaks["update"][0] / unit / layer.chunk, "chunks"),
        ("logits.time_ratio", contest.ratio, "ratio"),
        ("push.peak_ratio", push_ratio(), "ratio"),
        ("plan.byte_error_frac", error, "frac"),
    ):
        print(json.dumps({"metric": metric, "value": round(value, 4), "unit": what}))


if __name__ == "__main__":
    main()
