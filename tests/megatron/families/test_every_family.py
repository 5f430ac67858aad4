"""Every family in Megatron is what it is in transformers: logits, routes, gradients, export.

One process a family builds the trainer, the model in transformers and an engine, and returns what
the tests below compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_replay.checkpoint.files import SafetensorsCheckpoint
from moe_replay.checkpoint.stacked import usual_parts
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.weights import export_hf_weights, save_hf_checkpoint
from moe_replay.routing import Routing
from moe_replay.testing.policies import mean_loss, pack, start_policy, with_own_routes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import (
    RoutedSample,
    random_routes,
    shift_tokens,
    with_routes,
    with_trace,
)
from moe_replay.testing.tiny_models import FAMILIES, write_tiny_checkpoint
from moe_replay.transformers import find_routers, record_routes, replay_routes

pytestmark = pytest.mark.ranks
SEED = 71
SAMPLING = SamplingParams(max_completion_length=8, seed=SEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one family showed; differences are the largest of any number."""

    layers: tuple[int, ...]
    """Of the routers that transformers has."""
    own_layers: tuple[int, ...]
    """Of the trainer's."""
    logits: float
    """Difference of logits."""
    differing_rows: int
    """Rows and layers whose live experts are not those of the plain model."""
    engine_rows: int
    """Rows and layers whose live experts are not those of the engine."""
    k3: float
    """Of the engine's log-probabilities against replayed ones."""
    k3_shifted: float
    """The same with routes shifted by one token."""
    own_differ: int
    """Log-probabilities that differ when a model replays its own routes."""
    foreign: float
    """Difference of log-probabilities under random routes."""
    foreign_moves: float
    """What random routes change of them."""
    gradients: float
    """Relative difference of a gradient under random routes."""
    worst: str
    """Where that is."""
    gate_gradients: int
    """Routers whose gradient was compared."""
    unlike: list[str]
    """Tensors of the export that are not those of the source."""
    pushed: bool
    """Whether an engine samples the same after a push of the same weights."""


def prompts() -> list[Request]:
    rng = np.random.default_rng(SEED)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 99, length).astype(np.int32),
            num_generations=1,
        )
        for number, length in enumerate((5, 9, 12))
    ]


def sampled(engine: EmbeddedEngine, policy: MegatronActor) -> list[RoutedSample]:
    """Return the engine's completions as the trainer takes them."""
    from moe_replay.batch import Sample

    samples = []
    for group in engine.generate(prompts(), SAMPLING):
        (completion,) = group.completions
        sample = Sample(
            sample_id=group.request.request_id,
            token_ids=group.request.sequence(completion.token_ids),
            prompt_length=len(group.request.prompt_ids),
            rollout_logprobs=completion.rollout_logprobs,
            advantage=1.0,
            trains=True,
        )
        samples.append(with_trace(sample, completion.trace))
    return samples


def logprobs(policy: MegatronActor, samples: Any, routing: Routing) -> dict[int, np.ndarray]:
    scored = policy.score(pack(samples), temperature=1.0, routing=routing).samples
    return {key: scored[key].token_logprobs for key in scored}


def k3(policy: MegatronActor, samples: list[RoutedSample]) -> float:
    found = logprobs(policy, samples, Routing.REPLAY)
    ratios = np.concatenate([found[s.sample_id] - s.rollout_logprobs for s in samples])
    return float(np.mean(np.expm1(ratios.astype(np.float64)) - ratios))


def apart(first: np.ndarray, second: np.ndarray) -> int:
    return int((np.sort(first, axis=-1) != np.sort(second, axis=-1)).any(axis=-1).sum())


def look(checkpoint: Path, folder: Path) -> Found:
    """Compare the trainer, transformers and the engine on one checkpoint."""
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    policy = start_policy(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config._experts_implementation = "eager"
    sites = find_routers(model)
    samples = sampled(engine, policy)
    tokens = torch.from_numpy(samples[-1].token_ids.astype(np.int64))[None]
    with torch.no_grad(), record_routes(model) as recorder:
        expected = model(tokens).logits[0]
    plain = recorder.take().numpy()
    (chunk,) = map(unwrap, policy.chunks)
    with torch.no_grad():
        logits = chunk(tokens, torch.arange(tokens.shape[1])[None], None)[0]
    own = with_own_routes(policy, samples)
    live = logprobs(policy, own, Routing.LIVE)
    replayed = logprobs(policy, own, Routing.REPLAY)
    rng = np.random.default_rng(SEED)
    num_experts = own[0].trace.num_experts
    foreign = [with_routes(s, random_routes(rng, s.trace.expert_ids, num_experts)) for s in own]
    forced = logprobs(policy, foreign, Routing.REPLAY)
    save_hf_checkpoint(policy.modules, checkpoint, folder / "export")
    engine.load_weights(export_hf_weights(policy.modules), policy_version=1)
    again = sampled(engine, policy)
    theirs, errors = in_transformers(policy, model, foreign)
    return Found(
        layers=tuple(site.layer for site in sites),
        own_layers=tuple(policy.routers),
        logits=float((logits - expected).abs().max()),
        differing_rows=apart(own[-1].trace.expert_ids[:-1], plain[:-1]),
        engine_rows=sum(
            apart(ours.trace.expert_ids[:-1], s.trace.expert_ids[:-1])
            for ours, s in zip(own, samples, strict=True)
        ),
        k3=k3(policy, samples),
        k3_shifted=k3(policy, shift_tokens(own, 1)),
        own_differ=sum(int((live[key] != replayed[key]).sum()) for key in live),
        foreign=max(float(np.abs(theirs[key] - forced[key]).max()) for key in forced),
        foreign_moves=max(float(np.abs(forced[key] - live[key]).max()) for key in forced),
        gradients=max(errors.values()),
        worst=max(errors, key=lambda name: errors[name]),
        gate_gradients=sum(".gate.weight" in n or ".router.weight" in n for n in errors),
        unlike=unlike(checkpoint, folder / "export"),
        pushed=all(
            a.token_ids.tolist() == b.token_ids.tolist()
            and a.rollout_logprobs.tolist() == b.rollout_logprobs.tolist()
            for a, b in zip(again, samples, strict=True)
        ),
    )


def in_transformers(
    policy: MegatronActor, model: Any, samples: list[RoutedSample]
) -> tuple[dict[int, np.ndarray], dict[str, float]]:
    """Return the log-probabilities of transformers, and the relative error of each gradient."""
    policy.optimizer.step = lambda: (True, 0.0, 0)
    policy.update(pack(samples), mean_loss, temperature=1.0, routing=Routing.REPLAY)

    def main_grad(parameter: Any) -> torch.Tensor:
        return getattr(parameter, "main_grad", torch.zeros_like(parameter))

    ours = dict(export_hf_weights(policy.modules, read=main_grad))
    found = {}
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        trace = sample.trace
        with replay_routes(model, trace.expert_ids, trace.valid, layers=trace.layers):
            rows = model(ids[None]).logits[0].log_softmax(-1)[sample.prompt_length - 1 : -1]
        chosen = rows.gather(1, ids[sample.prompt_length :, None])[:, 0]
        (-chosen.sum() / 64).backward()
        found[sample.sample_id] = chosen.detach().numpy()
    # transformers gives the embedding of the padding token no gradient.
    ours["model.embed_tokens.weight"][model.config.pad_token_id] = 0
    errors = {}
    for name, parameter in model.named_parameters():
        shape, family = tuple(parameter.shape), model.config.model_type
        for usual, part in usual_parts(name, shape, family) if parameter.grad is not None else ():
            theirs = parameter.grad if part.expert is None else part.part_of(parameter.grad)
            error = (theirs - ours[usual]).norm() / (theirs.norm() + 1e-6)
            errors[usual] = float(error)
    return found, errors


def unlike(source: Path, export: Path) -> list[str]:
    with SafetensorsCheckpoint(source) as before, SafetensorsCheckpoint(export) as after:
        names = before.stored.keys() | after.stored.keys()
        held = (
            {n: s.name for n, s in before.stored.items()},
            {n: s.name for n, s in after.stored.items()},
        )
        return sorted(
            name
            for name in names
            if held[0].get(name) != held[1].get(name) or not torch.equal(before[name], after[name])
        )


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return what each family in turn shows, on two layers, or three where the first is dense."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_tiny_checkpoint(folder / "model", request.param, num_hidden_layers=3)
    print("seed", SEED)
    return run_ranks(look, 1, checkpoint, folder)[0]


def test_logits_equal_transformers(found: Found) -> None:
    assert found.logits < 1e-5


def test_routers_are_those_of_the_model_and_choose_the_same_experts(found: Found) -> None:
    assert found.own_layers == found.layers
    assert (found.differing_rows, found.engine_rows) == (0, 0)


def test_replay_of_a_models_own_routes_changes_no_bit(found: Found) -> None:
    assert found.own_differ == 0


def test_replayed_rollouts_agree_with_the_engine_and_shifted_routes_do_not(found: Found) -> None:
    assert found.k3 < 1e-9
    assert found.k3_shifted > 1e-4


def test_foreign_routes_give_the_log_probabilities_of_transformers(found: Found) -> None:
    assert found.foreign < 2e-5
    assert found.foreign_moves > 0.05


def test_foreign_routes_give_the_gradients_of_transformers(found: Found) -> None:
    assert found.gate_gradients == len(found.layers)
    assert found.gradients < 2e-5, found.worst


def test_an_export_has_the_bits_and_names_of_its_source_and_engines_take_it(found: Found) -> None:
    assert found.unlike == []
    assert found.pushed
