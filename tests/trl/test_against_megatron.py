"""TRL under replay computes what our own trainer's policy computes from the same rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_replay.testing.ranks import run_ranks

pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ranks]
CLIP = 0.2


@dataclass(frozen=True)
class Update:
    """An update of TRL: what it read, and what came of it."""

    checkpoint: Path
    samples: list[Any]
    advantages: list[float]
    old_logprobs: list[np.ndarray]
    new_logprobs: list[np.ndarray]
    loss: float
    grad_norm: float


@pytest.fixture(scope="module")
def update(trainer_of, tmp_path_factory) -> Update:
    """Stop TRL at the second update of a generation, whose weights did not sample."""
    from moe_replay.trl import ReplayGRPOTrainer

    path, seen = tmp_path_factory.mktemp("moved"), {}

    class Stopped(ReplayGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            if self.state.global_step == 1:
                self.model.save_pretrained(path)
                self.processing_class.save_pretrained(path)
                seen.update(inputs)
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            seen["new"] = scored[0].detach()
            return scored

    changes = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 2}
    trainer = trainer_of(Stopped, changes | {"loss_type": "bnpo", "max_grad_norm": 0.0})
    trainer.train()
    last = [line for line in trainer.state.log_history if "grad_norm" in line][1]
    assert last["replay/agreement"] < 0.99, "else replay would change nothing"
    lengths = seen["completion_mask"].sum(1).tolist()
    rows = range(len(lengths))
    return Update(
        checkpoint=path,
        samples=seen["moe_replay"],
        advantages=seen["advantages"].tolist(),
        old_logprobs=[seen["old_per_token_logps"][at, : lengths[at]].numpy() for at in rows],
        new_logprobs=[seen["new"][at, : lengths[at]].numpy() for at in rows],
        loss=last["loss"],
        grad_norm=last["grad_norm"],
    )


def megatron_samples(update: Update) -> list[Any]:
    from moe_replay.batch import Sample

    return [
        Sample(
            sample_id=at,
            token_ids=sample.token_ids.astype(np.int32),
            prompt_length=sample.num_prompt_tokens,
            rollout_logprobs=sample.rollout_logprobs,
            advantage=update.advantages[at],
            trains=True,
        )
        for at, sample in enumerate(update.samples)
    ]


def megatron_update(update: Update, replays: bool) -> tuple[np.ndarray, float, float]:
    """Return new log-probabilities, loss and gradient norm of the policy on Megatron-Core."""
    import torch

    import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
    from moe_replay.batch import build_microbatch
    from moe_replay.megatron.chunks import moe_layers
    from moe_replay.megatron.layout import ParallelLayout, initialize
    from moe_replay.megatron.logprobs import token_statistics
    from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
    from moe_replay.megatron.replay import ReplayScope
    from moe_replay.megatron.scorer import packed_rows
    from moe_replay.megatron.weights import load_hf_weights
    from moe_replay.routing import slice_routes

    layout = ParallelLayout()
    initialize(layout)
    shape = read_model_shape(update.checkpoint)
    (model,) = chunks = build_model(shape, transformer_config(shape, layout, dtype=torch.float32))
    load_hf_weights(chunks, update.checkpoint)
    routers = moe_layers(chunks)
    batch = build_microbatch(0, megatron_samples(update))
    traces = [sample.trace for sample in update.samples]
    routes = slice_routes(traces, batch.router_index, layers=tuple(routers))
    if not replays:
        routes.valid[:] = False
    rows = np.flatnonzero(batch.predicts_sampled)
    read = (batch.token_ids, batch.positions, rows, batch.next_ids[rows])
    ids, positions, predicting, next_ids = map(torch.from_numpy, read)

    def of_rows(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(batch.place(values, fill=0.0)[batch.predicts_sampled])

    per_token = [
        np.full(len(old), update.advantages[at], dtype=np.float32)
        for at, old in enumerate(update.old_logprobs)
    ]
    scope = ReplayScope(routers, {0: routes})
    with scope.open():
        statistics = token_statistics(model, predicting, next_ids, temperature=1.0)
        with scope.microbatch(0), statistics:
            packed = packed_rows(batch.index.padded_lengths)
            new = model(ids[None], positions[None], None, packed_seq_params=packed)[0, :, 0]
        ratio, advantage = torch.exp(new - of_rows(update.old_logprobs)), of_rows(per_token)
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    gap = new.detach() - of_rows(update.new_logprobs)
    return gap.numpy(), float(loss), float(norm)


def test_logprobs_loss_and_gradient_are_those_of_the_megatron_policy(update):
    ((gap, loss, norm),) = run_ranks(megatron_update, 1, update, True)
    print(
        "largest gap", np.abs(gap).max(), "loss", loss, update.loss, "norm", norm, update.grad_norm
    )
    assert np.abs(gap).max() < 1e-5
    assert loss == pytest.approx(update.loss, abs=1e-5)
    assert norm == pytest.approx(update.grad_norm, rel=1e-4)


def test_without_the_routes_the_megatron_policy_parts_from_it(update):
    ((gap, _, norm),) = run_ranks(megatron_update, 1, update, False)
    print("largest gap", np.abs(gap).max(), "norm", norm, update.grad_norm)
    assert np.abs(gap).max() > 1e-3
    assert abs(norm / update.grad_norm - 1) > 1e-3
