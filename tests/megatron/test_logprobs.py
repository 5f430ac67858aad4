"""Log-probabilities and entropies from hidden rows are those of a softmax over the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear

from moe_replay.batch import Microbatch
from moe_replay.errors import UnsupportedError
from moe_replay.megatron.actor import MegatronActor
from moe_replay.megatron.backward import BackwardWork
from moe_replay.megatron.chunks import unwrap
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.logprobs import token_statistics
from moe_replay.megatron.weights import export_hf_weights
from moe_replay.routing import Routing
from moe_replay.testing.layouts import layout
from moe_replay.testing.policies import gradients, pack, start_policy
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.samples import make_samples
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
SEED = 4
TEMPERATURE = 0.7
CHUNK = 5
"""A microbatch has some 20 sampled tokens."""
Values = tuple[list[np.ndarray], list[np.ndarray], dict[str, torch.Tensor]]


def weighted_loss(microbatch: Microbatch, new_logprobs: torch.Tensor) -> torch.Tensor:
    """Return a loss that gives every token another gradient, whatever the packing."""
    rows = microbatch.predicts_sampled
    weights = np.sin(1.0 + 7 * microbatch.sample_ids[rows] + microbatch.positions[rows])
    return (new_logprobs * torch.from_numpy(weights.astype(np.float32))).sum() / 64


def chunked_step(
    checkpoint: Path,
    parallel: ParallelLayout,
    chunk_rows: int,
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Score and differentiate as training does: log-probabilities, entropies, gradients."""
    actor = start_policy(checkpoint, parallel, chunk_rows=chunk_rows, dtype=dtype)
    microbatches = pack(make_samples(8, seed=SEED), scorer=actor, row_multiple=4, count=4)
    scored = actor.score(microbatches, temperature=TEMPERATURE, routing=Routing.LIVE).samples
    actor.backward(microbatches, weighted_loss, temperature=TEMPERATURE, routing=Routing.LIVE)
    every = [scored[number] for number in range(8)]
    return (
        [sample.token_logprobs for sample in every],
        [sample.entropies for sample in every],
        gradients(actor),
    )


def logits_of(actor: MegatronActor, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the rows that predict, divided by the temperature, and the targets."""
    rows = np.flatnonzero(microbatch.predicts_sampled)
    logits = actor._forward(actor.modules[0], microbatch, None)[0, torch.from_numpy(rows)]
    return logits.double() / TEMPERATURE, torch.from_numpy(microbatch.next_ids[rows])


def plain_step(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Values:
    """Do the same in one process by a softmax over all logits, in float64."""
    actor = start_policy(checkpoint, dtype=dtype)
    microbatches = pack(make_samples(8, seed=SEED), row_multiple=4, count=4)
    logprobs, entropies = {}, {}
    for microbatch in microbatches:
        logits, next_ids = logits_of(actor, microbatch)
        every = logits.log_softmax(-1)
        picked = every.gather(1, next_ids[:, None])[:, 0]
        entropy = -(every.exp() * every).sum(-1)
        weighted_loss(microbatch, picked).backward()
        owners = microbatch.sample_ids[microbatch.predicts_sampled]
        for sample in microbatch.samples:
            mine = torch.from_numpy(owners == sample.sample_id)
            logprobs[sample.sample_id] = picked[mine].detach().numpy()
            entropies[sample.sample_id] = entropy[mine].detach().numpy()

    def gradient(parameter: Any) -> torch.Tensor:
        return getattr(parameter, "main_grad", torch.zeros_like(parameter))

    found = {name: g.clone() for name, g in export_hf_weights(actor.modules, read=gradient)}
    return [logprobs[n] for n in range(8)], [entropies[n] for n in range(8)], found


def worst(found: Any, expected: Any) -> float:
    """Return the largest error, relative to the largest value."""
    found, expected = (torch.as_tensor(values).double() for values in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def assert_equal_values(found: Values, expected: Values, bound: float) -> None:
    for those, these in zip(found[:2], expected[:2], strict=True):
        assert worst(np.concatenate(those), np.concatenate(these)) < 2e-6
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        if gradient.abs().max() > 0:
            assert worst(found[2][name], gradient) < bound, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_t8_chunks_give_the_values_and_gradients_of_all_logits_in_every_layout(
    tmp_path: Path, tied: bool
) -> None:
    checkpoint = write_tiny_checkpoint(
        tmp_path, tie_word_embeddings=tied, num_hidden_layers=4, num_key_value_heads=2
    )
    (expected,) = run_ranks(plain_step, 1, checkpoint)
    for name, parallel, ranks, chunk in (
        ("one chunk", layout(), 1, 2048),
        ("chunks", layout(), 1, CHUNK),
        ("rows", layout(), 1, 1),
        ("tp2", layout(tp=2), 2, CHUNK),
        ("pp2", layout(pp=2), 2, CHUNK),
        ("pp2 vpp2", layout(pp=2, vpp=2), 2, CHUNK),
        ("cp2", layout(cp=2), 2, CHUNK),
    ):
        for found in run_ranks(chunked_step, ranks, checkpoint, parallel, chunk):
            # Chunks of one row take another kernel.
            assert_equal_values(found, expected, 1e-3 if chunk == 1 else 2e-5)
        print(name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bfloat16_loses_no_more_than_whole_logits_in_bfloat16(tmp_path: Path, tied: bool) -> None:
    """The gradient of the output layer's weight is summed over chunks in float32."""
    checkpoint = write_tiny_checkpoint(tmp_path, tie_word_embeddings=tied, num_hidden_layers=2)
    (expected,) = run_ranks(plain_step, 1, checkpoint, torch.bfloat16)
    (found,) = run_ranks(chunked_step, 1, checkpoint, layout(), CHUNK, torch.bfloat16)
    # Rounding inside the model; a lost gradient is 1.0.
    assert_equal_values(found, expected, 3e-2)
    if not tied:
        # Summed in bfloat16 it is 8e-3.
        assert worst(found[2]["lm_head.weight"], expected[2]["lm_head.weight"]) < 6e-3


def _with_lost_sum(checkpoint: Path) -> Values:
    from moe_replay.megatron import logprobs

    def not_summed(hidden: torch.Tensor, group: Any) -> torch.Tensor:
        return logprobs_gather(hidden, tensor_parallel_output_grad=False, group=group)

    logprobs_gather = logprobs.gather_from_sequence_parallel_region
    logprobs.gather_from_sequence_parallel_region = not_summed
    return chunked_step(checkpoint, layout(tp=2), CHUNK)


def test_a_gradient_that_is_not_summed_over_the_vocabulary_is_seen(tmp_path: Path) -> None:
    """The control: values stay right, gradients do not."""
    checkpoint = write_tiny_checkpoint(tmp_path)
    (expected,) = run_ranks(plain_step, 1, checkpoint)
    found = run_ranks(_with_lost_sum, 2, checkpoint)[0]
    assert worst(np.concatenate(found[0]), np.concatenate(expected[0])) < 2e-6
    with pytest.raises(AssertionError):
        assert_equal_values(found, expected, 2e-5)


def _bonus(checkpoint: Path, chunk_rows: int) -> list[float]:
    """Return the errors of a loss with an entropy bonus: its value, then of every gradient."""
    actor = start_policy(checkpoint)
    (microbatch,) = pack(make_samples(3, seed=SEED), max_tokens=512)
    model = actor.modules[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = np.flatnonzero(microbatch.predicts_sampled)
    logits, next_ids = logits_of(actor, microbatch)
    weights = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    every = logits.log_softmax(-1)
    expected = every.gather(1, next_ids[:, None])[:, 0] @ weights
    expected = expected - (every.exp() * every).sum(-1) @ weights.flip(0)
    exact = torch.autograd.grad(expected, parameters, allow_unused=True)
    with token_statistics(
        unwrap(model),
        torch.from_numpy(rows),
        next_ids,
        temperature=TEMPERATURE,
        with_entropies=True,
        chunk_rows=chunk_rows,
    ):
        found = actor._forward(model, microbatch, None)[0].double()
    loss = found[:, 0] @ weights + found[:, 1] @ weights.flip(0)
    # Without Megatron's wrapper, whose mark would send the weight's gradient elsewhere.
    del unwrap(model).output_layer.weight.grad_added_to_main_grad
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = [(g, e) for g, e in zip(got, exact, strict=True) if e is not None and e.abs().max() > 0]
    return [worst(loss.detach(), expected.detach()), *(worst(g, e) for g, e in pairs)]


@pytest.mark.parametrize("chunk_rows", [CHUNK, 2048])
def test_entropies_are_differentiable(checkpoint: Path, chunk_rows: int) -> None:
    (errors,) = run_ranks(_bonus, 1, checkpoint, chunk_rows)
    assert len(errors) > 10
    assert max(errors) < 2e-5, errors


def _bonus_gradients(checkpoint: Path, parallel: ParallelLayout) -> dict[str, torch.Tensor]:
    """Return the gradient of a loss in which every token's entropy has a weight of its own."""

    def loss(
        microbatch: Microbatch, new_logprobs: torch.Tensor, entropies: torch.Tensor
    ) -> torch.Tensor:
        return weighted_loss(microbatch, new_logprobs) + 3 * weighted_loss(microbatch, entropies)

    actor = start_policy(checkpoint, parallel, chunk_rows=CHUNK)
    microbatches = pack(make_samples(8, seed=SEED), scorer=actor, row_multiple=4, count=4)
    work = BackwardWork(
        microbatches=microbatches,
        loss=loss,
        temperature=TEMPERATURE,
        routing=Routing.LIVE,
        entropies_learn=True,
    )
    actor.forward_backward(work)
    actor.measure_gradient(work)
    return gradients(actor)


def test_an_entropy_bonus_has_the_gradient_of_one_process_in_every_layout(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path, num_hidden_layers=2, num_key_value_heads=2)
    (expected,) = run_ranks(_bonus_gradients, 1, checkpoint, layout())
    (without,) = run_ranks(chunked_step, 1, checkpoint, layout(), CHUNK)
    for name, parallel in (
        ("tp2", layout(tp=2)),
        ("pp2", layout(pp=2)),
        ("cp2", layout(cp=2)),
    ):
        for found in run_ranks(_bonus_gradients, 2, checkpoint, parallel):
            assert found.keys() == expected.keys()
            for key, gradient in expected.items():
                if gradient.abs().max() > 0:
                    assert worst(found[key], gradient) < 2e-5, (name, key)
    # The control: the bonus has a gradient of its own.
    assert worst(without[2]["lm_head.weight"], expected["lm_head.weight"]) > 0.1


def _of_one_layer(
    weight: list[list[float]], use: Callable[[Any, torch.Tensor], Any], *, tp: int = 1
) -> Any:
    """Call ``use`` with a model that is an output layer alone, and its weight, cut for ``tp``."""
    initialize(layout(tp=tp))
    layer = ColumnParallelLinear(
        len(weight[0]),
        len(weight),
        config=SimpleNamespace(
            sequence_parallel=False,
            perform_initialization=False,
            use_cpu_initialization=True,
            params_dtype=torch.float32,
            gradient_accumulation_fusion=False,
            defer_embedding_wgrad_compute=False,
            expert_model_parallel_size=1,
            cpu_offloading=False,
            disable_parameter_transpose_cache=False,
            symmetric_ar_type=None,
        ),
        init_method=torch.nn.init.zeros_,
        bias=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    size = len(weight) // tp
    layer.weight.data.copy_(torch.tensor(weight)[size * layer.tp_group.rank() :][:size])
    model = SimpleNamespace(
        post_process=True,
        pre_process=False,
        share_embeddings_and_output_weights=False,
        config=SimpleNamespace(mtp_num_layers=None, defer_embedding_wgrad_compute=False),
        output_layer=layer,
    )
    return use(model, layer.weight)


def _extreme(model: Any, weight: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    # Logits are the rows of the weight.
    hidden = torch.eye(3).unsqueeze(1).requires_grad_()
    rows, ids = torch.arange(3), torch.tensor([0, 0, 1])
    with token_statistics(model, rows, ids, temperature=1.0, with_entropies=True):
        values = model.output_layer(hidden)[0][:, 0]
    values.sum().backward()
    return values[:, 0].tolist(), values[:, 1].tolist(), hidden.grad.flatten().tolist()


def test_t12_a_masked_logit_adds_nothing_to_the_entropy() -> None:
    ln2 = math.log(2.0)
    columns = [[0.0, 0.0, -1e38], [5.0, -1e38, -1e38], [3e4, 3e4, -3e4]]
    weight = [list(row) for row in zip(*columns, strict=True)]
    logprobs, entropies, _ = run_ranks(_of_one_layer, 1, weight, _extreme)[0]
    assert entropies == pytest.approx([ln2, 0.0, ln2])
    assert logprobs == pytest.approx([-ln2, 0.0, -ln2])


def test_huge_logits_have_finite_gradients() -> None:
    weight = [[0.0, 3e4, 3e4], [0.0, -3e4, 3e4], [0.0, -3e4, -3e4]]
    *_, gradient = run_ranks(_of_one_layer, 1, weight, _extreme)[0]
    assert all(map(math.isfinite, gradient))


def _no_rows(model: Any, weight: torch.Tensor) -> tuple[list[int], float]:
    hidden = torch.zeros(4, 1, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    with token_statistics(model, none, none, temperature=1.0):
        values = model.output_layer(hidden)[0]
    values.sum().backward()
    return list(values.shape), float(hidden.grad.abs().max() + weight.grad.abs().max())


def test_a_microbatch_that_predicts_nothing_has_a_gradient_of_zero() -> None:
    weight = [[1.0, 2.0], [3.0, 4.0]]
    assert run_ranks(_of_one_layer, 1, weight, _no_rows)[0] == ([0, 1, 1], 0.0)


def _refused(model: Any, weight: torch.Tensor, post_process: bool) -> str:
    model.config.mtp_num_layers, model.post_process = 1, post_process
    with (
        pytest.raises(UnsupportedError) as refusal,
        token_statistics(model, torch.arange(1), torch.arange(1), temperature=1.0),
    ):
        pass
    assert "forward" not in vars(model.output_layer)
    return str(refusal.value)


@pytest.mark.parametrize("post_process", [True, False], ids=["last stage", "first stage"])
def test_a_model_that_predicts_further_tokens_is_refused_on_every_stage(post_process) -> None:
    refused = partial(_refused, post_process=post_process)
    (text,) = run_ranks(_of_one_layer, 1, [[1.0, 2.0]], refused)
    assert "mtp_num_layers is 1" in text
