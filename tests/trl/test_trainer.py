"""TRL's GRPO under replay: what R2 and R3 change, what they leave alone, and what stops them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_replay.errors import (
    CoverageError,
    MisalignmentError,
    ReplayScopeError,
    TokenMismatchError,
    UnsupportedError,
)

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

# Two updates a generation, so that the second one's weights are not those of the rollouts.
OFF_POLICY = {
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_steps": 2,
    "beta": 0.05,
}


def logged(trainer: Any, name: str) -> list[float]:
    """Train, and return a figure of each step that has it."""
    trainer.train()
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.fixture(scope="module")
def off_policy(trainer_of) -> dict[str, list[dict[str, float]]]:
    """Return the log of each mode."""
    from trl import GRPOTrainer

    from moe_replay.trl import ReplayGRPOTrainer

    logs = {}
    for mode in ("plain", "disabled", "R2", "R3"):
        kind = GRPOTrainer if mode == "plain" else ReplayGRPOTrainer
        options = {} if mode == "plain" else {"router_replay_mode": mode}
        trainer = trainer_of(kind, OFF_POLICY, **options)
        trainer.train()
        logs[mode] = [line for line in trainer.state.log_history if "grad_norm" in line]
    return logs


def column(log: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


def test_disabled_is_trl_bit_for_bit(off_policy):
    assert column(off_policy["disabled"], "grad_norm") == column(off_policy["plain"], "grad_norm")
    assert column(off_policy["disabled"], "loss") == column(off_policy["plain"], "loss")


def test_replay_changes_the_update_after_the_weights_moved_and_not_before(off_policy):
    plain, replayed = (column(off_policy[mode], "grad_norm") for mode in ("plain", "R3"))
    assert replayed[0] == pytest.approx(plain[0], rel=1e-5)
    assert abs(replayed[1] / plain[1] - 1) > 1e-3


def test_r2_and_r3_agree_where_the_engine_is_the_trainers_model(off_policy):
    for name in ("loss", "grad_norm", "replay/agreement"):
        expected = pytest.approx(column(off_policy["R3"], name), rel=1e-5)
        assert column(off_policy["R2"], name) == expected


def test_the_log_says_what_was_replayed(off_policy):
    first, second = off_policy["R3"]
    assert first["replay/coverage"] == second["replay/coverage"] == 1.0
    assert first["replay/agreement_min_sample"] == 1.0
    assert 0.3 < second["replay/agreement"] < 0.999
    assert 0 <= first["rollout_correction/k3_kl"] < 1e-9
    # Judged over the generation, before its first update.
    assert first["replay/guard_margin_nats"] < 0
    assert "replay/coverage" not in off_policy["disabled"][0]


def test_checkpointing_replays_the_routes_of_its_forward(trainer_of, off_policy):
    from moe_replay.trl import ReplayGRPOTrainer

    changes = OFF_POLICY | {"gradient_checkpointing": True}
    found = logged(trainer_of(ReplayGRPOTrainer, changes), "grad_norm")
    assert found == pytest.approx(column(off_policy["R3"], "grad_norm"), rel=1e-5)


def planted(change: Any) -> type:
    """Return a trainer whose samples are changed between generation and training."""
    from moe_replay.trl import ReplayGRPOTrainer

    class Planted(ReplayGRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            output["moe_replay"] = change(output["moe_replay"])
            return output

    return Planted


def one_late(samples: list[Any], at: int = 5) -> list[Any]:
    """Shift the routes of one sample, alone of all, by one token; its digest stays right."""
    trace = samples[at].trace
    late = np.roll(trace.expert_ids, 1, axis=0)
    late[0] = trace.expert_ids[0]
    changed = replace(samples[at], trace=replace(trace, expert_ids=late))
    return [*samples[:at], changed, *samples[at + 1 :]]


def weights(trainer: Any) -> Any:
    return trainer.model.model.layers[0].mlp.gate.weight.detach().clone()


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_one_sample_one_token_late_stops_before_the_optimizer(trainer_of, mode):
    trainer = trainer_of(planted(one_late), router_replay_mode=mode)
    before = weights(trainer)
    with pytest.raises(
        MisalignmentError, match=r"1 of 16 samples(?s:.*)sample 5 .*token shift \+1"
    ):
        trainer.train()
    assert (weights(trainer) == before).all()


def test_without_a_guard_the_late_sample_shows_in_the_log_alone(trainer_of):
    trainer = trainer_of(planted(one_late), guard=False)
    (agreement,) = logged(trainer, "replay/agreement_min_sample")
    assert agreement < 0.7
    assert trainer.state.global_step == 1


def test_samples_that_do_not_follow_the_batch_are_refused(trainer_of):
    trainer = trainer_of(planted(lambda samples: samples[::-1]))
    with pytest.raises(TokenMismatchError, match="reordered"):
        trainer.train()


def test_a_batch_without_its_samples_is_refused(trainer_of):
    with pytest.raises(ReplayScopeError, match="no list under the key"):
        trainer_of(planted(lambda samples: None)).train()


def test_routes_that_are_missing_stop_at_min_coverage(trainer_of):
    def without_prompts(samples: list[Any]) -> list[Any]:
        changed = []
        for sample in samples:
            valid = sample.trace.valid.copy()
            valid[: sample.num_prompt_tokens] = False
            changed.append(replace(sample, trace=replace(sample.trace, valid=valid)))
        return changed

    with pytest.raises(CoverageError, match="prompt_omitted"):
        trainer_of(planted(without_prompts)).train()


def test_truncated_completions_that_trl_masks_keep_their_prompt_alone(trainer_of):
    changes = {"mask_truncated_completions": True, "max_completion_length": 6, "temperature": 1.3}
    from moe_replay.trl import ReplayGRPOTrainer

    trainer = trainer_of(ReplayGRPOTrainer, changes)
    trainer.train()
    line = trainer.state.log_history[0]
    assert 0 < line["completions/clipped_ratio"] < 1
    assert line["replay/coverage"] == line["replay/agreement"] == 1.0
    assert line["rollout_correction/k3_kl"] < 1e-9


def test_the_reference_of_an_adapter_is_not_taken_for_the_policy(trainer_of):
    from peft import LoraConfig

    from moe_replay.trl import ReplayGRPOTrainer

    trainer = trainer_of(
        ReplayGRPOTrainer, OFF_POLICY, peft_config=LoraConfig(target_modules=["q_proj"])
    )
    trainer.train()
    first, second = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert first["kl"] == pytest.approx(0, abs=1e-9)  # a new adapter adds nothing
    assert first["rollout_correction/k3_kl"] < 1e-9
    assert first["replay/agreement"] == 1.0
    assert second["kl"] > 1e-9


def test_what_routes_cannot_follow_is_refused_by_name(trainer_of):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from moe_replay.trl import ReplayGRPOTrainer

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=512, num_attention_heads=4, num_key_value_heads=4, **sizes)
    with pytest.raises(UnsupportedError, match="is dense"):
        trainer_of(ReplayGRPOTrainer, model=Qwen3ForCausalLM(config))
    for mode in ("R2", "R3"):
        with pytest.raises(UnsupportedError, match=f"{mode} cannot follow .* rollout_func"):
            trainer_of(
                ReplayGRPOTrainer, router_replay_mode=mode, rollout_func=lambda prompts, trainer: {}
            )
    # The chat template of the demo's model renders no calls, so TRL itself takes no tools here.
    trainer = trainer_of(ReplayGRPOTrainer, router_replay_mode="R2")
    for name, value in (("tools", [len]), ("environment_factories", {None: object})):
        setattr(trainer, name, value)
        called = "environment_factory" if name == "environment_factories" else name
        with pytest.raises(UnsupportedError, match=f"R2 cannot follow .* {called}: TRL"):
            trainer._require_supported()


def test_images_are_given_to_trl_without_replay_and_refused_with_it():
    import torch

    from moe_replay.routing import Routing
    from moe_replay.trl.passes import SamplePass
    from moe_replay.trl.samples import RoutedSample
    from moe_replay.trl.watch import PassWatch

    samples = [
        RoutedSample(
            number=number,
            prompt=0,
            token_ids=np.array([7, 8 + number]),
            num_prompt_tokens=1,
            step=0,
            rollout_logprobs=np.array([-1.0], dtype=np.float32),
        )
        for number in range(2)
    ]
    ids, pixels = torch.tensor([[7, 8], [7, 9]]), torch.ones(3)
    seen = []

    def score(model: Any, *batch: Any, **options: Any) -> Any:
        seen.append((*batch, options))
        return torch.tensor([[-1.0], [-1.5]]), None, None

    watch, given = PassWatch(0), (score, None, torch.nn.Module(), ids, torch.ones_like(ids), 1, 1)
    now = SamplePass(samples=samples, routing=Routing.LIVE, watch=watch)
    now.score(*given, pixel_values=pixels)
    (call,) = seen  # one batch, cut by TRL, which knows whose the images are
    assert call[0] is ids and call[3] == 1 and call[4]["pixel_values"] is pixels
    # k3 of a gap of 0 and of -0.5: exp(-0.5) - 1 + 0.5.
    assert watch.mean_gaps() == {0: 0.0, 1: pytest.approx(0.1065307)}
    for routing in (Routing.RECORD, Routing.REPLAY):
        with pytest.raises(UnsupportedError, match="pixel_values"):
            replace(now, routing=routing).score(*given, pixel_values=pixels)


# Each of two batches is taken twice before the optimizer moves.
TWICE = {
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": 8,
}


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_a_sample_may_be_taken_twice_in_one_optimizer_step(trainer_of, mode):
    from moe_replay.trl import ReplayGRPOTrainer

    trainer = trainer_of(ReplayGRPOTrainer, TWICE, router_replay_mode=mode)
    (agreement,) = logged(trainer, "replay/agreement_min_sample")
    (line,) = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert (agreement, line["replay/coverage"], trainer.state.global_step) == (1.0, 1.0, 1)
    assert line["replay/guard_margin_nats"] < 0


def test_routes_that_are_lost_when_a_sample_is_taken_again_stop_before_the_optimizer(trainer_of):
    from moe_replay.trl import ReplayGRPOTrainer

    class Late(ReplayGRPOTrainer):
        calls = 0

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.calls += 1
            if self.calls == 3:  # the first batch, again
                samples = inputs["moe_replay"]
                longest = int(np.argmax([len(sample.token_ids) for sample in samples]))
                inputs = {**inputs, "moe_replay": one_late(samples, longest)}
            return super()._compute_loss(model, inputs)

    # Longer than the others' runs: a shift by one needs some rows to be seen.
    trainer = trainer_of(Late, TWICE | {"max_completion_length": 32})
    before = weights(trainer)
    with pytest.raises(MisalignmentError, match=r"1 of 16 samples(?s:.*)token shift \+1"):
        trainer.train()
    assert trainer.calls == 4 and (weights(trainer) == before).all()
