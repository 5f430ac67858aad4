"""The rules between keys of a recipe: contradictions, impossible layouts, and keys without effect.

In: sections that are valid by themselves. Out: `Problem` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from moe_replay.recipe.bearer import MASK
from moe_replay.routing import Routing
from moe_replay.tasks.datasets.files import HUB, has_splits

GENERATED = "reasoning_gym:"
"""Prefix of a dataset that is generated instead of read."""

_KEYS_OF_FILES = (
    "prompt_column",
    "messages_column",
    "columns",
    "drop_columns",
    "final_assistant_message",
    "cache_dir",
)
# Engine that is servers -> how one of them is started.
_SERVERS = {
    "vllm-server": "moe-replay serve MODEL",
    "sglang-server": "python -m sglang.launch_server --model-path MODEL --enable-return-routed-experts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a recipe."""

    path: str
    """Dotted key."""
    text: str
    """What was given, what was expected and what to do."""
    is_unsupported: bool = False
    """Whether the value makes sense but cannot be honoured."""


def rule_problems(sections: Mapping[str, Any]) -> list[Problem]:
    """Check every rule whose sections are all present; a section that is itself invalid is left out by the caller."""
    have = SimpleNamespace(**sections)
    return [
        problem
        for needed, rule in _RULES
        if all(name in sections for name in needed)
        for problem in rule(have)
    ]


def effect_free_keys(sections: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> reason, for every key that changes nothing given the other keys; absent sections are left out."""
    have = SimpleNamespace(**sections)
    return {
        path: reason
        for needed, rule in _EFFECT_RULES
        if all(name in sections for name in needed)
        for path, reason in rule(have)
    }


def _batch_against_generations(have: Any) -> Iterator[Problem]:
    if have.batch.global_batch_size % have.rollout.num_generations:
        yield Problem(
            path="batch.global_batch_size",
            text=f"{have.batch.global_batch_size} samples per update is not a multiple of rollout.num_generations = "
            f"{have.rollout.num_generations}, so the completions of a prompt would fall into different updates: "
            "change one of the two",
        )


def _one_way_to_split_a_batch(have: Any) -> Iterator[Problem]:
    budget, micro = have.batch.max_tokens_per_microbatch, have.batch.micro_batch_size
    if (budget is None) == (micro is None):
        given = "neither" if budget is None else "both"
        yield Problem(
            path="batch.max_tokens_per_microbatch",
            text=f"{given} of max_tokens_per_microbatch and micro_batch_size given, expected exactly one: "
            "the first packs samples up to a token budget, the second packs a fixed number of samples",
        )
    if micro is not None and have.batch.global_batch_size % micro:
        yield Problem(
            path="batch.micro_batch_size",
            text=f"{micro} does not divide global_batch_size = {have.batch.global_batch_size}: choose a divisor",
        )


def _budget_holds_a_sample(have: Any) -> Iterator[Problem]:
    budget = have.batch.max_tokens_per_microbatch
    longest = have.data.max_prompt_length + have.rollout.max_completion_length
    if budget is not None and budget < longest:
        yield Problem(
            path="batch.max_tokens_per_microbatch",
            text=f"{budget} tokens cannot hold one sample of data.max_prompt_length + rollout.max_completion_length "
            f"= {longest} tokens: raise it to at least {longest}, or lower one of the two lengths",
        )


def _optimizer_schedule(have: Any) -> Iterator[Problem]:
    if have.optimizer.min_lr > have.optimizer.lr:
        yield Problem(
            path="optimizer.min_lr",
            text=f"{have.optimizer.min_lr} is above lr = {have.optimizer.lr}: the schedule can only fall",
        )


def _warmup_ends(have: Any) -> Iterator[Problem]:
    updates = have.run.max_steps * have.batch.steps_per_generation
    if have.optimizer.warmup_steps >= updates:
        yield Problem(
            path="optimizer.warmup_steps",
            text=f"{have.optimizer.warmup_steps} updates of warm-up in a run of {updates} updates (run.max_steps x "
            "batch.steps_per_generation): lr would never be reached; lower it",
        )


def _layout_makes_sense(have: Any) -> Iterator[Problem]:
    layout = have.megatron
    stages = layout.pipeline_model_parallel_size
    if stages == 1:
        for key in (
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_model_parallel_layout",
        ):
            if getattr(layout, key) is not None:
                yield Problem(
                    path=f"megatron.{key}",
                    text=f"got {getattr(layout, key)!r} with pipeline_model_parallel_size = 1: there is one stage; "
                    "remove it, or raise pipeline_model_parallel_size",
                )
    uneven = layout.num_layers_in_first_pipeline_stage or layout.num_layers_in_last_pipeline_stage
    if layout.pipeline_model_parallel_layout is not None and uneven:
        yield Problem(
            path="megatron.pipeline_model_parallel_layout",
            text="given together with num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage: "
            "both say how layers are dealt; keep one",
        )


def _grouped_experts_are_whole(have: Any) -> Iterator[Problem]:
    expert_tensor = (
        have.megatron.expert_tensor_parallel_size or have.megatron.tensor_model_parallel_size
    )
    if have.model.grouped_experts and expert_tensor > 1:
        yield Problem(
            path="model.grouped_experts",
            text=f"true, but each expert is cut over {expert_tensor} ranks, and the grouped product needs whole "
            "experts: set megatron.expert_tensor_parallel_size = 1, or grouped_experts = false",
            is_unsupported=True,
        )


def _recompute_is_complete(have: Any) -> Iterator[Problem]:
    layout = have.megatron
    if layout.recompute_granularity == "full":
        for key in ("recompute_method", "recompute_num_layers"):
            if getattr(layout, key) is None:
                yield Problem(
                    path=f"megatron.{key}",
                    text="missing, but Megatron-Core needs it with recompute_granularity = 'full': "
                    "set recompute_method = 'uniform' and recompute_num_layers = 1 to recompute every layer",
                )


def _servers_are_named(have: Any) -> Iterator[Problem]:
    urls = have.rollout.urls
    start = _SERVERS.get(have.rollout.engine)
    if start is not None and (not urls or len(set(urls)) < len(urls)):
        yield Problem(
            path="rollout.urls",
            text=f"got {list(urls)}, expected the address of at least one server, each once: start one with "
            f"`{start}` and name it",
        )


def _secrets_are_filled_in(have: Any) -> Iterator[Problem]:
    for url in have.rollout.urls:
        if f"{MASK}@" in url or f"={MASK}" in url:
            yield Problem(
                path="rollout.urls",
                text=f"{url} holds {MASK} in place of a credential: a recipe that was printed or kept in a run directory has "
                "them masked; write it in again",
            )


def _files_are_named(have: Any) -> Iterator[Problem]:
    if have.rollout.engine == "files" and have.rollout.path is None:
        yield Problem(
            path="rollout.path",
            text="missing, but rollout.engine = 'files' reads completions from it: name the folder that `moe-replay rollout "
            "RECIPE --output FOLDER` wrote",
        )


def _files_answer_no_evaluation(have: Any) -> Iterator[Problem]:
    if have.rollout.engine == "files" and have.data.eval is not None:
        yield Problem(
            path="data.eval",
            text="given with rollout.engine = 'files', which holds completions of training prompts only: remove it, or choose "
            "an engine that samples",
            is_unsupported=True,
        )


def _reward_names_differ(have: Any) -> Iterator[Problem]:
    names = [reward.name for reward in have.rewards]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Problem(
                path=f"rewards.{number}.name",
                text=f"{name!r} is also the name of rewards.{names.index(name)}, and metrics go by that name: "
                "give one of them another name",
            )


def _live_gap_needs_replay(have: Any) -> Iterator[Problem]:
    replay = have.replay
    if not replay.router_replay_mode.replays and replay.live_gap_every:
        yield Problem(
            path="replay.live_gap_every",
            text=f"{replay.live_gap_every} with router_replay_mode = 'disabled', where every pass is live and "
            "rollout_correction/* is the live gap already: set it to 0, or choose a mode that replays",
        )


def _one_size_of_vllms_cache(have: Any) -> Iterator[Problem]:
    gib, share = have.rollout.kv_cache_gib, have.rollout.gpu_memory_utilization
    if gib is not None and share is not None:
        yield Problem(
            path="rollout.gpu_memory_utilization",
            text=f"{share} beside kv_cache_gib = {gib}, and vLLM would ignore the share: give one of the two",
        )


def _eval_samples_differ(have: Any) -> Iterator[Problem]:
    if have.eval.temperature == 0 and have.eval.num_generations > 1:
        yield Problem(
            path="eval.num_generations",
            text=f"{have.eval.num_generations} completions at temperature 0 are all equal: "
            "set eval.temperature above 0, or num_generations = 1",
        )


def _replay_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    replay = have.replay
    if not replay.router_replay_mode.replays:
        for key in type(replay).model_fields:
            # A rule of its own refuses a live gap; 0 is taken, so that one recipe serves every mode.
            if key not in ("router_replay_mode", "live_gap_every"):
                yield f"replay.{key}", "replay.router_replay_mode is 'disabled'"
    elif not replay.guard:
        for key in ("on_misaligned", "max_dropped_frac"):
            yield f"replay.{key}", "replay.guard is false"
    elif replay.router_replay_mode.passes.engine is not Routing.RECORD:
        for key in ("on_misaligned", "max_dropped_frac"):
            yield (
                f"replay.{key}",
                "replay.router_replay_mode is 'R2', whose routes are the trainer's own: one that is misaligned is a fault "
                "of the trainer, which always stops",
            )
    elif replay.on_misaligned == "stop":
        yield "replay.max_dropped_frac", "replay.on_misaligned is 'stop'"


def _engine_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    if have.rollout.engine != "vllm":
        for key in ("kv_cache_gib", "gpu_memory_utilization", "tensor_parallel_size"):
            yield f"rollout.{key}", f"rollout.engine is {have.rollout.engine!r}, not 'vllm'"
    if have.rollout.engine not in _SERVERS:
        for key in ("urls", "token_file", "ca_file", "weights_dir", "timeout_s"):
            yield f"rollout.{key}", f"rollout.engine is {have.rollout.engine!r}, not a server"
    elif not any(url.lower().startswith("https://") for url in have.rollout.urls):
        yield "rollout.ca_file", "no address in rollout.urls begins with https://"
    if have.rollout.engine == "files":
        for key in ("dtype", "max_batch_size"):
            yield f"rollout.{key}", "rollout.engine is 'files', and nothing is sampled"
    else:
        for key in ("path", "allow_stale"):
            yield f"rollout.{key}", f"rollout.engine is {have.rollout.engine!r}, not 'files'"


def _reference_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    if have.grpo.beta == 0:
        yield "replay.reference_routes", "grpo.beta is 0, so there is no reference model"


def _dataset_keys_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    locations = [location for location in (have.data.train, have.data.eval) if location is not None]
    if not any(location.startswith(GENERATED) for location in locations):
        yield "data.task", "no dataset is generated by reasoning_gym"
    if all(location.startswith(GENERATED) for location in locations):
        for key in _KEYS_OF_FILES:
            yield f"data.{key}", "every dataset is generated by reasoning_gym"
    if not any(location.startswith(HUB) for location in locations):
        yield "data.hub_config", "no dataset is read from the hub (hf:ORG/NAME)"
    if have.data.train.startswith(GENERATED):
        yield "data.shuffle", "generated items come in random order already"
    else:
        yield "data.train_seed", "data.train is a file; run.seed shuffles it"
    if have.data.train.startswith(GENERATED) or not has_splits(have.data.train):
        yield "data.train_split", "data.train is neither a folder nor a dataset of the hub"
    if have.data.eval is None:
        for key in ("eval_size", "eval_seed", "eval_split"):
            yield f"data.{key}", "data.eval is not set"
        return
    if not have.data.eval.startswith(GENERATED):
        yield "data.eval_seed", "data.eval is a file"
    if have.data.eval.startswith(GENERATED) or not has_splits(have.data.eval):
        yield "data.eval_split", "data.eval is neither a folder nor a dataset of the hub"


def _eval_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    if have.data.eval is None:
        for key in type(have.eval).model_fields:
            yield f"eval.{key}", "data.eval is not set, so nothing is evaluated"


def _optimizer_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    if have.optimizer.lr_scheduler == "constant":
        yield "optimizer.min_lr", "optimizer.lr_scheduler is 'constant'"


def _recompute_without_effect(have: Any) -> Iterator[tuple[str, str]]:
    granularity = have.megatron.recompute_granularity
    given = "is not set" if granularity is None else f"is {granularity!r}"
    if granularity != "full":
        for key in ("recompute_method", "recompute_num_layers"):
            yield f"megatron.{key}", f"megatron.recompute_granularity {given}, not 'full'"
    if granularity != "selective":
        yield (
            "megatron.recompute_modules",
            f"megatron.recompute_granularity {given}, not 'selective'",
        )


_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], Iterator[Problem]]], ...] = (
    (("batch", "rollout"), _batch_against_generations),
    (("batch",), _one_way_to_split_a_batch),
    (("batch", "data", "rollout"), _budget_holds_a_sample),
    (("optimizer",), _optimizer_schedule),
    (("run", "batch", "optimizer"), _warmup_ends),
    (("megatron",), _layout_makes_sense),
    (("model", "megatron"), _grouped_experts_are_whole),
    (("megatron",), _recompute_is_complete),
    (("rollout",), _servers_are_named),
    (("rollout",), _secrets_are_filled_in),
    (("rollout",), _files_are_named),
    (("rollout", "data"), _files_answer_no_evaluation),
    (("rollout",), _one_size_of_vllms_cache),
    (("rewards",), _reward_names_differ),
    (("eval",), _eval_samples_differ),
    (("replay",), _live_gap_needs_replay),
)
_EFFECT_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], Iterator[tuple[str, str]]]], ...] = (
    (("rollout",), _engine_without_effect),
    (("replay",), _replay_without_effect),
    (("grpo",), _reference_without_effect),
    (("data",), _dataset_keys_without_effect),
    (("data", "eval"), _eval_without_effect),
    (("optimizer",), _optimizer_without_effect),
    (("megatron",), _recompute_without_effect),
)
