"""The rules between keys about how a run goes: batches, layout, engines, replay."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.recipe.bearer import MASK
from moe_replay.recipe.options.problems import megatron_problems
from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.sections.rollout import (
    FilesEngineSection,
    RolloutSection,
    ServersEngineSection,
    VllmEngineSection,
)
from moe_replay.recipe.sections.run import DataSection, ModelSection, RunSection
from moe_replay.recipe.sections.training import (
    OWN_TRANSFORMER_KEYS,
    BatchSection,
    GrpoSection,
    MegatronSection,
    OptimizerSection,
    ReplaySection,
)
from moe_replay.routing import Routing

# Engine that is servers -> how one of them is started.
_START_SERVER = {
    "vllm-server": "moe-replay serve MODEL",
    "sglang-server": "python -m sglang.launch_server --model-path MODEL "
    "--enable-return-routed-experts",
}


@Rule
def _batch_against_generations(batch: BatchSection, rollout: RolloutSection) -> Iterator[Problem]:
    if batch.global_batch_size % rollout.num_generations:
        yield Problem(
            "batch.global_batch_size",
            f"{batch.global_batch_size} samples per update is not a multiple of "
            f"rollout.num_generations = {rollout.num_generations}, so the completions of a prompt "
            "would fall into different updates: change one of the two",
        )


@Rule
def _one_way_to_split_a_batch(batch: BatchSection) -> Iterator[Problem]:
    budget, micro = batch.max_tokens_per_microbatch, batch.micro_batch_size
    if (budget is None) == (micro is None):
        given = "neither" if budget is None else "both"
        yield Problem(
            "batch.max_tokens_per_microbatch",
            f"{given} of max_tokens_per_microbatch and micro_batch_size given, expected exactly "
            "one: the first packs samples up to a token budget, the second packs a fixed number "
            "of samples",
        )
    if micro is not None and batch.global_batch_size % micro:
        yield Problem(
            "batch.micro_batch_size",
            f"{micro} does not divide global_batch_size = {batch.global_batch_size}: choose a "
            "divisor",
        )


@Rule
def _budget_holds_a_sample(
    batch: BatchSection, data: DataSection, rollout: RolloutSection
) -> Iterator[Problem]:
    longest = data.max_prompt_length + rollout.max_completion_length
    for key in ("max_tokens_per_microbatch", "max_tokens_per_scoring_microbatch"):
        budget = getattr(batch, key)
        if budget is not None and budget < longest:
            text = (
                f"{budget} tokens cannot hold one sample of data.max_prompt_length + rollout."
                f"max_completion_length = {longest} tokens: raise it, or lower one of the lengths"
            )
            yield Problem(f"batch.{key}", text)


@Rule
def _schedule_falls(optimizer: OptimizerSection) -> Iterator[Problem]:
    if optimizer.min_lr > optimizer.lr:
        text = f"{optimizer.min_lr} is above lr = {optimizer.lr}: the schedule can only fall"
        yield Problem("optimizer.min_lr", text)


@Rule
def _warmup_ends(
    run: RunSection, batch: BatchSection, optimizer: OptimizerSection
) -> Iterator[Problem]:
    updates = run.max_steps * batch.steps_per_generation
    if optimizer.warmup_steps >= updates:
        yield Problem(
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} updates of warm-up in a run of {updates} updates "
            "(run.max_steps x batch.steps_per_generation): lr would never be reached; lower it",
        )


@Rule
def _layers_are_dealt_over_stages(megatron: MegatronSection) -> Iterator[Problem]:
    if megatron.pipeline_model_parallel_size == 1:
        for key in (
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
        ):
            if getattr(megatron, key) is not None:
                yield Problem(
                    f"megatron.{key}",
                    f"got {getattr(megatron, key)!r} with pipeline_model_parallel_size = 1: there "
                    "is one stage; remove it, or raise pipeline_model_parallel_size",
                )
    uneven = (
        megatron.num_layers_in_first_pipeline_stage or megatron.num_layers_in_last_pipeline_stage
    )
    if megatron.pipeline_model_parallel_layout is not None and uneven:
        yield Problem(
            "megatron.pipeline_model_parallel_layout",
            "given together with num_layers_in_first_pipeline_stage or "
            "num_layers_in_last_pipeline_stage: both say how layers are dealt; keep one",
        )


@Rule
def _grouped_experts_are_not_cut(
    model: ModelSection, megatron: MegatronSection
) -> Iterator[Problem]:
    if model.grouped_experts and megatron.expert_tensor_size > 1:
        yield Problem(
            "model.grouped_experts",
            f"true, but each expert is cut over {megatron.expert_tensor_size} ranks, and the "
            "grouped product needs complete experts: set megatron.expert_tensor_parallel_size = 1, "
            "or grouped_experts = false",
            is_unsupported=True,
        )


@Rule
def _recompute_is_complete(megatron: MegatronSection) -> Iterator[Problem]:
    if megatron.recompute_granularity == "full":
        for key in ("recompute_method", "recompute_num_layers"):
            if getattr(megatron, key) is None:
                yield Problem(
                    f"megatron.{key}",
                    "missing, but Megatron-Core needs it with recompute_granularity = 'full': set "
                    "recompute_method = 'uniform' and recompute_num_layers = 1 to recompute every "
                    "layer",
                )


@Rule
def _servers_are_named(rollout: ServersEngineSection) -> Iterator[Problem]:
    if not rollout.urls or len(set(rollout.urls)) < len(rollout.urls):
        yield Problem(
            "rollout.urls",
            f"got {list(rollout.urls)}, expected the address of at least one server, each once: "
            f"start one with `{_START_SERVER[rollout.engine]}` and name it",
        )


@Rule
def _pushes_meet_a_rollout(rollout: ServersEngineSection) -> Iterator[Problem]:
    key = "rollout.push_in_flight"
    if rollout.push_in_flight and not rollout.max_staleness:
        why = "nothing is sampled while weights are pushed: set max_staleness = 1, or this to false"
        yield Problem(key, f"true with rollout.max_staleness = 0, where {why}")
    if rollout.push_in_flight and rollout.engine != "vllm-server":
        why = "only `moe-replay serve` says which weights sampled which token: set it to false"
        yield Problem(key, f"true with rollout.engine = {rollout.engine!r}: {why}", True)


@Rule
def _truncation_is_recorded(rollout: ServersEngineSection) -> Iterator[Problem]:
    if rollout.engine == "vllm-server":
        # `moe-replay serve` records it; that a server is none of those it says itself.
        return
    for key, neutral in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        value = getattr(rollout, key)
        if value != neutral:
            yield Problem(
                f"rollout.{key}",
                f"{value:g} with rollout.engine = {rollout.engine!r}, whose servers do not say which "
                "ids each token was drawn from, so that the trainer would learn with the "
                f"probabilities of another policy: set it to {neutral}, or choose 'embedded', 'vllm' "
                "or 'vllm-server' with `moe-replay serve`",
                is_unsupported=True,
            )


@Rule
def _secrets_are_filled_in(rollout: ServersEngineSection) -> Iterator[Problem]:
    for url in rollout.urls:
        if f"{MASK}@" in url or f"={MASK}" in url:
            yield Problem(
                "rollout.urls",
                f"{url} holds {MASK} in place of a credential: a recipe that was printed or kept "
                "in a run directory has them masked; write it in again",
            )


@Rule
def _one_size_of_vllms_cache(rollout: VllmEngineSection) -> Iterator[Problem]:
    gib, share = rollout.kv_cache_gib, rollout.gpu_memory_utilization
    if gib is not None and share is not None:
        yield Problem(
            "rollout.gpu_memory_utilization",
            f"{share} beside kv_cache_gib = {gib}, and vLLM would ignore the share: give one of "
            "the two",
        )


@Rule
def _nothing_is_given_back_while_training(
    rollout: ServersEngineSection, megatron: MegatronSection
) -> Iterator[Problem]:
    level = megatron.offload_during_rollout
    if rollout.max_staleness and level not in ("auto", "none"):
        yield Problem(
            "megatron.offload_during_rollout",
            f"{level!r} with rollout.max_staleness = {rollout.max_staleness}: the trainer computes "
            "while the servers sample, and needs all of its memory; remove it, or set "
            "max_staleness = 0",
        )


@Rule
def _live_gap_needs_replay(replay: ReplaySection) -> Iterator[Problem]:
    if not replay.router_replay_mode.replays and replay.live_gap_every:
        yield Problem(
            "replay.live_gap_every",
            f"{replay.live_gap_every} with router_replay_mode = 'disabled', where every pass is "
            "live and rollout_correction/* is the live gap already: set it to 0, or choose a mode "
            "that replays",
        )


@Rule
def _megatron_options_fit(model: ModelSection, megatron: MegatronSection) -> Iterator[Problem]:
    asked, follows = megatron.model_dump(), megatron.optimizer_fields()
    for found in megatron_problems(asked, follows, OWN_TRANSFORMER_KEYS, model.dtype):
        yield Problem(*found)


@EffectRule
def _certificates_without_tls(rollout: ServersEngineSection) -> Iterator[tuple[str, str]]:
    if not any(url.lower().startswith("https://") for url in rollout.urls):
        yield "rollout.ca_file", "no address in rollout.urls begins with https://"


@EffectRule
def _replay_without_effect(replay: ReplaySection) -> Iterator[tuple[str, str]]:
    if not replay.router_replay_mode.replays:
        for key in type(replay).model_fields:
            # A rule refuses a live gap; 0 is accepted, so that one recipe serves every mode.
            if key not in ("router_replay_mode", "live_gap_every"):
                yield f"replay.{key}", "replay.router_replay_mode is 'disabled'"
    elif not replay.guard:
        for key in ("on_misaligned", "max_dropped_frac"):
            yield f"replay.{key}", "replay.guard is false"
    elif replay.router_replay_mode.passes.engine is not Routing.RECORD:
        for key in ("on_misaligned", "max_dropped_frac"):
            yield (
                f"replay.{key}",
                "replay.router_replay_mode is 'R2', whose routes are the trainer's own: one that "
                "is misaligned is a fault of the trainer, which always stops",
            )
    elif replay.on_misaligned == "stop":
        yield "replay.max_dropped_frac", "replay.on_misaligned is 'stop'"


@EffectRule
def _scoring_without_effect(
    batch: BatchSection, replay: ReplaySection, grpo: GrpoSection
) -> Iterator[tuple[str, str]]:
    if grpo.beta == 0:
        yield "replay.reference_routes", "grpo.beta is 0, so there is no reference model"
        if batch.why_old_pass(replay.router_replay_mode) is None and grpo.why_old_pass is None:
            why = "grpo.beta is 0, and the update's own pass gives the old log-probabilities"
            yield "batch.max_tokens_per_scoring_microbatch", why


@EffectRule
def _optimizer_without_effect(optimizer: OptimizerSection) -> Iterator[tuple[str, str]]:
    if optimizer.lr_scheduler == "constant":
        yield "optimizer.min_lr", "optimizer.lr_scheduler is 'constant'"


@EffectRule
def _nothing_is_sampled(
    rollout: FilesEngineSection, megatron: MegatronSection
) -> Iterator[tuple[str, str]]:
    yield "megatron.offload_during_rollout", f"rollout.engine = {rollout.engine!r} holds no model"


@EffectRule
def _recompute_without_effect(megatron: MegatronSection) -> Iterator[tuple[str, str]]:
    granularity = megatron.recompute_granularity
    given = "is not set" if granularity is None else f"is {granularity!r}"
    if granularity != "full":
        for key in ("recompute_method", "recompute_num_layers"):
            yield f"megatron.{key}", f"megatron.recompute_granularity {given}, not 'full'"
    if granularity != "selective":
        why = f"megatron.recompute_granularity {given}, not 'selective'"
        yield "megatron.recompute_modules", why
