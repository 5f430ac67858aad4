import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_replay.checkpoint.facts import checkpoint_tensors
from moe_replay.engines.checks import check_group
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import FinishReason, Request, RolloutProgress, SamplingParams
from moe_replay.errors import EngineError, RecipeError, UnsupportedError
from moe_replay.testing.tiny_models import FAMILIES, VOCAB_SIZE, write_tiny_checkpoint
from moe_replay.transformers import record_routes

GREEDY = SamplingParams(max_completion_length=6, temperature=0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def checkpoint(root):
    return write_tiny_checkpoint(root / "a", num_hidden_layers=2)


@pytest.fixture(scope="module")
def other(root):
    return write_tiny_checkpoint(root / "b", num_hidden_layers=2, seed=1)


def prompts(*lengths, num_generations=1, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 99, length).astype(np.int32),
            num_generations=num_generations,
        )
        for number, length in enumerate(lengths)
    ]


def pushed(path):
    return checkpoint_tensors(path)


def forced_routes(path, token_ids):
    """Return the routes of a plain forward pass of the checkpoint in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad(), record_routes(model) as recorder:
        model(torch.from_numpy(token_ids).long()[None])
    return recorder.take().numpy()


def assert_exact(path, groups):
    """Check every routed row against a plain forward pass of the same tokens."""
    for group in groups:
        for completion in group.completions:
            tokens = np.concatenate([group.request.prompt_ids, completion.token_ids])
            ours, theirs = completion.trace.expert_ids[:-1], forced_routes(path, tokens)[:-1]
            assert (np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_records_its_own_routes(root, family):
    path = write_tiny_checkpoint(root / f"f-{family}", family, num_hidden_layers=2)
    engine = EmbeddedEngine(path, dtype="float32")
    groups = engine.generate(prompts(3, 9, num_generations=2), GREEDY)
    for group in groups:
        check_group(group, engine.description)
    assert_exact(path, groups)


def test_sliding_windows_stay_exact_under_padding(root):
    path = write_tiny_checkpoint(root / "w", "mixtral", num_hidden_layers=2, sliding_window=8)
    groups = EmbeddedEngine(path, dtype="float32").generate(prompts(2, 13, 20), GREEDY)
    assert_exact(path, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_push_equals_loading_the_checkpoint(root, family):
    paths = [
        write_tiny_checkpoint(root / f"p-{family}-{seed}", family, num_hidden_layers=2, seed=seed)
        for seed in (0, 1)
    ]
    engine = EmbeddedEngine(paths[0], dtype="bfloat16")
    engine.load_weights(pushed(paths[1]), policy_version=1)
    fresh = EmbeddedEngine(paths[1], dtype="bfloat16")
    requests = prompts(4, 11)
    for ours, theirs in zip(
        engine.generate(requests, GREEDY), fresh.generate(requests, GREEDY), strict=True
    ):
        (a,), (b,) = ours.completions, theirs.completions
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.rollout_logprobs.tolist() == b.rollout_logprobs.tolist()
        assert (a.trace.expert_ids == b.trace.expert_ids).all()


def test_a_push_leaves_the_checkpoint_on_disk_alone(root, other):
    path = write_tiny_checkpoint(root / "disk", num_hidden_layers=2)
    file = path / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    engine = EmbeddedEngine(path, dtype="float32")
    engine.load_weights(pushed(other), policy_version=1)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_overwriting_the_checkpoint_leaves_the_engine_alone(root, other):
    path = write_tiny_checkpoint(root / "overwritten", num_hidden_layers=2)
    engine = EmbeddedEngine(path, dtype="float32")
    (before,) = engine.generate(prompts(5), GREEDY)
    (path / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    (after,) = engine.generate(prompts(5), GREEDY)
    ours, theirs = before.completions[0], after.completions[0]
    assert ours.rollout_logprobs.tolist() == theirs.rollout_logprobs.tolist()


def test_a_failed_push_stops_sampling_until_one_succeeds(checkpoint, other):
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    with pytest.raises(EngineError, match="were not pushed"):
        engine.load_weights(list(pushed(other))[:-1], policy_version=1)
    with pytest.raises(EngineError, match="weights of two policies"):
        engine.generate(prompts(5), GREEDY)
    engine.load_weights(pushed(other), policy_version=1)
    assert len(engine.generate(prompts(5), GREEDY)) == 1


def test_ended_sequences_leaving_the_batch_change_nothing(checkpoint):
    sampling = SamplingParams(max_completion_length=24, stop_token_ids=tuple(range(4, 16)), seed=2)
    requests = prompts(3, 7, 12, 20, num_generations=4)
    together = EmbeddedEngine(checkpoint, dtype="float32").generate(requests, sampling)
    alone = EmbeddedEngine(checkpoint, dtype="float32", max_batch_size=1).generate(
        requests, sampling
    )
    ends = []
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert np.abs(a.rollout_logprobs - b.rollout_logprobs).max() < 1e-5
            assert (np.sort(a.trace.expert_ids) == np.sort(b.trace.expert_ids)).all()
            ends.append(len(a.token_ids))
    # Rows left early, late, and several times: otherwise this test would show nothing.
    assert len(set(ends)) > 4


def test_each_distinct_prompt_runs_once(checkpoint):
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    with record_routes(engine._model) as recorder:
        engine.generate(prompts(9, num_generations=5), SamplingParams(max_completion_length=1))
        assert len(recorder.take()) == 9


def test_stop_tokens_come_from_the_generation_config(root):
    path = write_tiny_checkpoint(root / "eos", num_hidden_layers=2)
    settings = json.loads((path / "generation_config.json").read_text())
    settings["eos_token_id"] = list(range(4, 99))
    (path / "generation_config.json").write_text(json.dumps(settings))
    (group,) = EmbeddedEngine(path, dtype="float32").generate(prompts(5), GREEDY)
    (completion,) = group.completions
    assert len(completion.token_ids) == 1
    assert completion.finish_reason is FinishReason.STOP


def test_a_model_without_a_stop_token_samples_to_the_limit(root):
    path = write_tiny_checkpoint(root / "no-eos", num_hidden_layers=2, eos_token_id=None)
    for file in path.glob("tokenizer*"):
        file.unlink()
    groups = EmbeddedEngine(path, dtype="float32").generate(
        prompts(5, num_generations=8), SamplingParams(max_completion_length=30)
    )
    reasons = {completion.finish_reason for completion in groups[0].completions}
    assert reasons == {FinishReason.LENGTH}


def test_e19_a_stop_token_that_only_the_tokenizer_names_ends_completions(root):
    path = write_tiny_checkpoint(root / "their-eos", num_hidden_layers=2, eos_token_id=None)
    engine = EmbeddedEngine(path, dtype="float32")
    (group,) = engine.generate(
        prompts(5, num_generations=32), SamplingParams(max_completion_length=60)
    )
    stopped = [c for c in group.completions if c.finish_reason is FinishReason.STOP]
    assert stopped
    assert all(c.token_ids[-1] == 1 and 1 not in c.token_ids[:-1] for c in stopped)


def test_e18_ids_beyond_the_tokenizer_are_never_sampled(root):
    path = write_tiny_checkpoint(root / "padded", num_hidden_layers=2, vocab_size=VOCAB_SIZE * 2)
    engine = EmbeddedEngine(path, dtype="float32")
    for sampling in (GREEDY, SamplingParams(max_completion_length=40)):
        (group,) = engine.generate(prompts(5, num_generations=8), sampling)
        assert max(c.token_ids.max() for c in group.completions) < VOCAB_SIZE
        assert_exact(path, [group])


def test_a_dense_model_gives_completions_without_traces(root):
    path = write_tiny_checkpoint(root / "dense", num_hidden_layers=2, mlp_only_layers=[0, 1])
    engine = EmbeddedEngine(path, dtype="float32")
    description = engine.description
    assert (description.records_routes, description.moe_layers) == (False, ())
    assert (description.num_experts, description.topk) == (0, 0)
    (group,) = engine.generate(prompts(5), GREEDY)
    assert group.completions[0].trace is None


def test_recording_off_changes_nothing_but_the_trace(checkpoint):
    requests = prompts(5, 8)
    on = EmbeddedEngine(checkpoint, dtype="float32").generate(requests, GREEDY)
    engine = EmbeddedEngine(checkpoint, dtype="float32", record_routes=False)
    off = engine.generate(requests, GREEDY)
    assert not engine.description.records_routes
    for ours, theirs in zip(on, off, strict=True):
        assert theirs.completions[0].trace is None
        assert (
            ours.completions[0].rollout_logprobs.tolist()
            == theirs.completions[0].rollout_logprobs.tolist()
        )


def test_a_push_that_does_not_fit_is_refused(checkpoint, other):
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    push, norm = dict(pushed(other)), "model.norm.weight"
    with pytest.raises(EngineError, match=f"{norm} was pushed twice"):
        engine.load_weights([(norm, push[norm])] * 2, policy_version=1)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(EngineError, match=f"{fused} is not in this model's checkpoint"):
        engine.load_weights([*push.items(), (fused, torch.zeros(1))], policy_version=1)
    del push[norm], push["model.layers.0.mlp.experts.3.up_proj.weight"]
    with pytest.raises(EngineError, match=r"2 of \d+ weights.*experts\.3\.up_proj.*model\.norm"):
        engine.load_weights(push.items(), policy_version=1)


def test_tied_embeddings_are_pushed_under_one_name(root):
    paths = [
        write_tiny_checkpoint(
            root / f"tied-{seed}", num_hidden_layers=2, seed=seed, tie_word_embeddings=True
        )
        for seed in (0, 1)
    ]
    engine = EmbeddedEngine(paths[0], dtype="float32")
    engine.load_weights(pushed(paths[1]), policy_version=1)
    fresh = EmbeddedEngine(paths[1], dtype="float32")
    ours, theirs = (e.generate(prompts(5), GREEDY)[0].completions[0] for e in (engine, fresh))
    assert ours.rollout_logprobs.tolist() == theirs.rollout_logprobs.tolist()
    push = dict(pushed(paths[1]))
    embedding = push.pop("model.embed_tokens.weight")
    push["lm_head.weight"] = embedding
    engine.load_weights(push.items(), policy_version=2)
    engine.load_weights([*push.items(), ("model.embed_tokens.weight", embedding)], policy_version=3)
    with pytest.raises(EngineError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        engine.load_weights(
            [*push.items(), ("model.embed_tokens.weight", embedding + 1)], policy_version=4
        )


def test_an_embedding_of_another_name_is_tied_by_its_memory(root):
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    config.bos_token_id, config.eos_token_id = 1, 2
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    engine = EmbeddedEngine(root / "gpt2", dtype="float32")
    push = load_file(root / "gpt2" / "model.safetensors")
    engine.load_weights(push.items(), policy_version=1)
    (embedding,) = (name for name in push if name.endswith("wte.weight"))
    del push[embedding]
    with pytest.raises(EngineError, match=r"wte\.weight"):
        engine.load_weights(push.items(), policy_version=2)


def test_a_recurrent_model_is_refused(root):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    path = root / "recurrent"
    Qwen3NextForCausalLM(config).save_pretrained(path)
    with pytest.raises(UnsupportedError, match="recurrent state"):
        EmbeddedEngine(path, dtype="float32")


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"holds no config\.json"):
        EmbeddedEngine(tmp_path, dtype="float32")


def test_a_batch_of_none_is_refused(checkpoint):
    with pytest.raises(RecipeError, match="max_batch_size is 0"):
        EmbeddedEngine(checkpoint, dtype="float32", max_batch_size=0)


def test_d9_the_engine_says_how_far_it_is(checkpoint):
    engine = EmbeddedEngine(checkpoint, dtype="float32", max_batch_size=2)
    seen = []
    engine._model.register_forward_pre_hook(lambda *_: seen.append(engine.progress))
    groups = engine.generate(prompts(5, 6, num_generations=2), GREEDY)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert {progress.num_total for progress in seen} == {4}
    tokens = [progress.num_tokens for progress in seen]
    assert tokens == sorted(tokens)
    assert tokens[0] == 0
    # The second batch starts when the first has ended.
    second = next(progress for progress in seen if progress.num_finished == 2)
    assert second.num_tokens == sum(lengths[:2])
    assert engine.progress == RolloutProgress()


def test_e3_a_cancelled_call_ends_before_its_next_token_and_the_engine_goes_on(checkpoint):
    engine = EmbeddedEngine(checkpoint, dtype="float32")
    asked: list[int] = []

    def cancelled_after(tokens):
        asked.clear()
        return lambda: len(asked) == tokens or asked.append(0)

    with pytest.raises(EngineError, match="cancelled by its caller before sampled token 3 of 2"):
        engine.generate(prompts(3, 9), GREEDY, cancelled=cancelled_after(3))
    assert len(asked) == 3
    assert engine.progress == RolloutProgress()
    # The control: a caller that stays gets every token, those of the cancelled call too.
    stayed = engine.generate(prompts(3, 9), GREEDY, cancelled=cancelled_after(100))
    assert [len(c.token_ids) for group in stayed for c in group.completions] == [6, 6]
    assert_exact(checkpoint, stayed)
