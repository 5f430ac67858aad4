"""What is vLLM's own: cache, scheduler, process, the CPU build's defects that the plugin fixes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import (
    Engine,
    Request,
    RolloutGroup,
    RolloutProgress,
    SamplingParams,
)
from moe_replay.errors import EngineError, RecipeError, UnsupportedError
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]

SAMPLING = SamplingParams(max_completion_length=16, temperature=0.8, seed=5)
SHAPE = {"num_hidden_layers": 3, "mlp_only_layers": [1]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vllm")
    wanted = [("a", 0, False), ("b", 1, False), ("tied", 0, True), ("tied b", 1, True)]
    return {
        name: write_tiny_checkpoint(root / name, seed=seed, tie_word_embeddings=tied, **SHAPE)
        for name, seed, tied in wanted
    }


def start(path: Path, **options: object) -> Engine:
    from moe_replay.engines.vllm.engine import VllmEngine

    return VllmEngine(
        path, **{"dtype": "float32", "max_batch_size": 16, "kv_cache_gib": 0.05, **options}
    )


@pytest.fixture(scope="module")
def engine(vllm_imported: None, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    engine = start(checkpoints["a"])
    yield engine
    engine.close()


def prompts(count: int, *, length: int = 40, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(
            request_id=number,
            prompt_ids=rng.integers(4, 100, length).astype(np.int32),
            num_generations=2,
        )
        for number in range(count)
    ]


def gap(ours: list[RolloutGroup], theirs: list[RolloutGroup]) -> float:
    """Return the largest gap of log-probabilities, infinite where tokens or routes differ."""
    gaps = []
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in zip(a.completions, b.completions, strict=True):
            same = mine.token_ids.tolist() == other.token_ids.tolist()
            if (
                not same
                or (np.sort(mine.trace.expert_ids) != np.sort(other.trace.expert_ids)).any()
            ):
                return float("inf")
            gaps.append(np.abs(mine.rollout_logprobs - other.rollout_logprobs).max())
    return max(gaps)


def test_vllm_and_the_embedded_engine_give_the_same_completions(engine, checkpoints):
    embedded = EmbeddedEngine(checkpoints["a"], dtype="float32")
    requests = prompts(6)
    assert gap(engine.generate(requests, SAMPLING), embedded.generate(requests, SAMPLING)) < 1e-4


def test_a_prompt_asked_twice_is_answered_from_the_cache(engine, monkeypatch):
    requests = prompts(2, length=80, seed=9)
    step, cached = engine._vllm.step, []

    def watched():
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(engine._vllm, "step", watched)
    engine.generate(requests, SAMPLING)
    assert len(cached) == 4 and cached != [64] * 4
    engine.generate(requests, SAMPLING)
    # Two of the three blocks of 32 that hold a prompt of 80 tokens are full.
    assert cached[4:] == [64] * 4


def test_vllm_runs_uncompiled_on_the_cpu_with_its_caches_on(engine):
    config = engine._vllm.vllm_config
    # Compiled for the CPU, vLLM 0.30 returns zeros for routes without an error.
    assert config.model_config.enforce_eager
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill


def test_threads_that_generate_together_get_their_own_completions(engine):
    first, second = prompts(4, seed=2), prompts(4, seed=3)
    second = [
        Request(request_id=100 + r.request_id, prompt_ids=r.prompt_ids, num_generations=2)
        for r in second
    ]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda r: engine.generate(r, SAMPLING), [first, second]))
    alone = [engine.generate(requests, SAMPLING) for requests in (first, second)]
    assert all(gap(a, b) < 1e-5 for a, b in zip(together, alone, strict=True))


def assert_usable(engine: Engine, checkpoint: Path) -> None:
    """A push is taken, and tokens are right: nothing of an earlier call is left in vLLM."""
    assert not engine._vllm.has_unfinished_requests()
    engine.load_weights(
        load_file(checkpoint / "model.safetensors").items(),
        policy_version=engine.policy_version + 1,
    )
    expected = EmbeddedEngine(checkpoint, dtype="float32").generate(prompts(2), SAMPLING)
    assert gap(engine.generate(prompts(2), SAMPLING), expected) < 1e-4
    assert engine.progress == RolloutProgress()


def test_e14_a_request_that_vllm_loses_is_an_error_and_no_completion(
    engine, checkpoints, monkeypatch
):
    step, lost = engine._vllm.step, []

    def losing():
        if not lost:
            lost.extend(list(engine._stepper._call_of)[:1])
            engine._vllm.abort_request(lost)
        return step()

    with monkeypatch.context() as patched:
        patched.setattr(engine._vllm, "step", losing)
        with pytest.raises(EngineError, match=r"1 completions unfinished.*lost requests"):
            engine.generate(prompts(2), SAMPLING)
    assert_usable(engine, checkpoints["a"])


def test_e14_a_failure_while_adding_leaves_no_request_behind(engine, checkpoints, monkeypatch):
    core = engine._vllm.engine_core
    add, added = core.add_request, []

    def failing(request):
        added.append(request)
        # The front of vLLM knows the fourth already.
        if len(added) == 4:
            raise RuntimeError("the core is full")
        add(request)

    with monkeypatch.context() as patched:
        patched.setattr(core, "add_request", failing)
        with pytest.raises(EngineError, match=r"6 completions unfinished.*the core is full"):
            engine.generate(prompts(3), SAMPLING)
    assert len(added) == 4
    assert_usable(engine, checkpoints["a"])


def test_e14_a_step_that_fails_inside_the_model_leaves_no_request_behind(
    engine, checkpoints, monkeypatch
):
    executor = engine._vllm.engine_core.engine_core.model_executor
    execute, calls = executor.execute_model, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return execute(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(executor, "execute_model", failing)
        with pytest.raises(EngineError, match=r"4 completions unfinished.*out of memory"):
            engine.generate(prompts(2), SAMPLING)
    assert_usable(engine, checkpoints["a"])


def test_e14_a_caller_that_is_interrupted_leaves_no_request_behind(
    engine, checkpoints, monkeypatch
):
    step, steps = engine._vllm.step, []

    def interrupting():
        steps.append(1)
        if len(steps) == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            left.wait()
        return step()

    left = threading.Event()
    # A shell starts what runs in its background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched, ExitStack() as at_end:
        at_end.callback(signal.signal, signal.SIGINT, before)
        at_end.callback(left.set)
        patched.setattr(engine._vllm, "step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts(2), SAMPLING)
        left.set()
        with engine._stepper.paused():
            pass
    # The step that was under way, and no other.
    assert len(steps) == 2
    assert_usable(engine, checkpoints["a"])


def test_an_engine_that_records_no_routes_says_so(checkpoints):
    engine = start(checkpoints["a"], record_routes=False)
    (group,) = engine.generate(prompts(1), SAMPLING)
    engine.close()
    assert not engine.description.records_routes
    assert [c.trace for c in group.completions] == [None, None]


def test_starting_leaves_the_process_as_it_was(checkpoints):
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.set_num_threads
    start(checkpoints["a"]).close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.set_num_threads is before[1]


def test_closing_one_engine_leaves_another_at_work(checkpoints, engine):
    start(checkpoints["b"]).close()
    assert engine.generate(prompts(1), SAMPLING)


def test_a_start_that_fails_raises_our_error(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "a", **SHAPE)
    with pytest.raises(EngineError, match="vLLM did not start"):
        start(path, kv_cache_gib=1e-6)


def test_a_context_beyond_the_positions_of_the_model_raises(checkpoints):
    with pytest.raises(RecipeError, match="max_context_length"):
        start(checkpoints["a"], max_context_length=100_000)


def test_a_seed_is_refused_where_it_would_end_the_engine():
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.engines.vllm.sampler import DrawTokens

    with pytest.raises(ValueError, match="ends vLLM's CPU engine"):
        DrawTokens.validate_params(VllmSamplingParams(seed=1))
    DrawTokens.validate_params(VllmSamplingParams())
    # Why: vLLM rewinds a seeded generator after each chunk of a prompt.
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator("cpu").set_offset(0)


def test_draws_are_refused_when_vllm_would_draw_again():
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.engines.vllm.sampler import DrawTokens, draw_params

    params = draw_params(SAMPLING, request_id=1, completion=0, stop_token_ids=(1,))
    DrawTokens.validate_params(params)
    for change in ({"temperature": 1.0}, {"logprobs": None}):
        changed = VllmSamplingParams(
            **{"temperature": 0.0, "logprobs": 0, "extra_args": params.extra_args, **change}
        )
        with pytest.raises(ValueError, match="needs temperature 0"):
            DrawTokens.validate_params(changed)


def test_a_draw_with_unknown_keys_is_refused():
    from vllm import SamplingParams as VllmSamplingParams

    from moe_replay.engines.vllm.sampler import DrawTokens

    params = VllmSamplingParams(temperature=0.0, logprobs=0, extra_args={"moe_replay": {"seed": 1}})
    with pytest.raises(ValueError, match="expected"):
        DrawTokens.validate_params(params)


def without(monkeypatch: pytest.MonkeyPatch, *places: tuple[object, str]) -> None:
    """Put vLLM's own functions back in place of their mends."""
    for owner, name in places:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


def test_without_the_patch_a_push_ruins_the_experts(monkeypatch, checkpoints, engine):
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    embedded = EmbeddedEngine(checkpoints["b"], dtype="float32")
    expected = embedded.generate(prompts(3), SAMPLING)
    pushed = load_file(checkpoints["b"] / "model.safetensors")
    broken = start(checkpoints["a"])
    with monkeypatch.context() as unpatched:
        without(unpatched, (UnquantizedFusedMoEMethod, "_setup_kernel"))
        broken.load_weights(pushed.items(), policy_version=1)
        assert gap(broken.generate(prompts(3), SAMPLING), expected) > 0.1
    broken.load_weights(pushed.items(), policy_version=2)
    assert gap(broken.generate(prompts(3), SAMPLING), expected) < 1e-4
    broken.close()


def test_without_the_patch_a_tied_head_stays_that_of_the_first_policy(monkeypatch, checkpoints):
    from vllm.model_executor.model_loader.reload import layerwise

    embedded = EmbeddedEngine(checkpoints["tied b"], dtype="float32")
    expected = embedded.generate(prompts(3), SAMPLING)
    pushed = load_file(checkpoints["tied b"] / "model.safetensors")
    broken = start(checkpoints["tied"])
    with monkeypatch.context() as unpatched:
        without(unpatched, (layerwise, "finalize_layerwise_processing"))
        broken.load_weights(pushed.items(), policy_version=1)
        assert gap(broken.generate(prompts(3), SAMPLING), expected) > 0.1
    broken.load_weights(pushed.items(), policy_version=2)
    assert gap(broken.generate(prompts(3), SAMPLING), expected) < 1e-4
    broken.close()


def test_patching_twice_changes_nothing():
    from vllm.model_executor.model_loader.reload import layerwise

    from moe_replay.engines.vllm.plugin import register

    register()
    patched = layerwise.finalize_layerwise_processing
    register()
    assert layerwise.finalize_layerwise_processing is patched


def test_an_unpatched_vllm_is_refused(monkeypatch):
    from vllm.model_executor.model_loader.reload import layerwise

    from moe_replay.engines.vllm.plugin import check_patched, register

    register()
    check_patched()
    without(monkeypatch, (layerwise, "finalize_layerwise_processing"))
    with pytest.raises(UnsupportedError, match="silently corrupts expert weights"):
        check_patched()


def test_another_release_is_left_alone_and_refused(monkeypatch, caplog):
    import vllm
    from vllm.model_executor.model_loader.reload import layerwise

    from moe_replay.engines.vllm.plugin import register
    from moe_replay.engines.vllm.startup import vllm_version

    register()
    without(monkeypatch, (layerwise, "finalize_layerwise_processing"))
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    register()
    assert not hasattr(layerwise.finalize_layerwise_processing, "__wrapped__")
    assert "is not patched" in caplog.text
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.31\.0 is installed, expected 0\.30"):
        vllm_version()


def test_vllm_loads_the_plugin_by_itself():
    from importlib.metadata import entry_points

    names = {point.value for point in entry_points(group="vllm.general_plugins")}
    assert "moe_replay.engines.vllm.plugin:register" in names


def test_d9_the_engine_says_how_far_it_is(engine, monkeypatch):
    seen = []
    step = engine._vllm.step
    monkeypatch.setattr(engine._vllm, "step", lambda: seen.append(engine.progress) or step())
    groups = engine.generate(prompts(3), SAMPLING)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    assert {progress.num_total for progress in seen} == {6}
    tokens = [progress.num_tokens for progress in seen]
    assert tokens == sorted(tokens)
    assert 0 < tokens[-1] < sum(lengths)
    assert engine.progress == RolloutProgress()
