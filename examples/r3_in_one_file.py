"""GRPO with R3 in one file: from prompts to an optimizer step, by the library's pieces alone.

    python examples/r3_in_one_file.py    # three steps of the demo's model, a minute on a CPU

    1 completions -> 2 rewards -> 3 samples -> 4 microbatch -> 5 guard -> 6 updates -> 7 push
      and routes ---------------> of tokens -> in rows ------> replayed -> replayed

`moe-replay train` adds ranks, more microbatches, checkpoints, evaluation and metrics.
"""

from pathlib import Path

import numpy as np
import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer
from transformers import AutoTokenizer

from moe_replay.batch import Microbatch, Sample, build_microbatch
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Engine, Request, SamplingParams
from moe_replay.grpo.advantage import group_advantages
from moe_replay.megatron.chunks import moe_layers
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.logprobs import token_statistics
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.replay import ReplayScope
from moe_replay.megatron.replay.overlap import RowOwners
from moe_replay.megatron.scorer import packed_rows
from moe_replay.megatron.weights import export_hf_weights, load_hf_weights
from moe_replay.routing import Coverage, Guard, check_routes, slice_routes

CHECKPOINT = Path(__file__).parents[1] / "recipes" / "demo" / "model"
TASK = {"min_terms": 5, "max_terms": 5, "max_digits": 1}
NUM_PROMPTS, GROUP_SIZE, NUM_UPDATES, CLIP = 8, 4, 2, 0.2


def sampled_logprobs(model: torch.nn.Module, batch: Microbatch, scope: ReplayScope) -> torch.Tensor:
    """Run Megatron under replay; return the log-probabilities of the sampled tokens."""
    rows = np.flatnonzero(batch.predicts_sampled)
    arrays = (batch.token_ids, batch.positions, rows, batch.next_ids[rows])
    ids, positions, predicting, next_ids = map(torch.from_numpy, arrays)
    packed = packed_rows(batch.index.padded_lengths)
    statistics = token_statistics(model, predicting, next_ids, temperature=1.0)
    with scope.microbatch(batch.key), statistics:  # its routes; no logits of all rows
        return model(ids[None], positions[None], None, packed_seq_params=packed)[0, :, 0]


def train(engine: Engine, num_steps: int) -> list[dict[str, float]]:
    """Take GRPO steps with R3; return the figures of each."""
    # The policy: the engine's checkpoint on Megatron-Core, in one process.
    layout = ParallelLayout()
    initialize(layout)
    shape = read_model_shape(CHECKPOINT)
    (model,) = chunks = build_model(shape, transformer_config(shape, layout, dtype=torch.float32))
    load_hf_weights(chunks, CHECKPOINT)
    routers = moe_layers(chunks)  # global decoder layer -> router
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=False)
    task = reasoning_gym.create_dataset("chain_sum", size=num_steps * NUM_PROMPTS, seed=7, **TASK)
    guard, history = Guard(), []

    for step in range(num_steps):
        # 1. Completions, with the experts that the engine used for every token that it was fed.
        items = [task[step * NUM_PROMPTS + i] for i in range(NUM_PROMPTS)]
        requests = []
        for i, item in enumerate(items, start=step * NUM_PROMPTS):
            chat = [{"role": "user", "content": item["question"]}]
            encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
            ids = np.array(encoded["input_ids"], dtype=np.int32)
            requests.append(Request(request_id=i, prompt_ids=ids, num_generations=GROUP_SIZE))
        groups = engine.generate(requests, SamplingParams(max_completion_length=24))

        # 2. Rewards, compared within each group.
        rewards = np.zeros((NUM_PROMPTS, GROUP_SIZE))
        for i, group in enumerate(groups):
            ids = [completion.token_ids for completion in group.completions]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            rewards[i] = [task.score_answer(extract_answer(text), items[i]) for text in texts]
        advantages = group_advantages(rewards, scale_rewards="group").advantages.ravel()

        # 3. Samples, and routes that must belong to their tokens: one token off raises.
        samples, traces, coverage = [], [], []
        for group in groups:
            for completion in group.completions:
                prompt, trace = group.request.prompt_ids, completion.trace
                sample = Sample(
                    sample_id=len(samples),
                    token_ids=np.concatenate([prompt, completion.token_ids]),
                    prompt_length=len(prompt),
                    rollout_logprobs=completion.rollout_logprobs,
                    advantage=float(advantages[len(samples)]),
                    trains=True,
                )
                trace.check_tokens(sample.token_ids, where=f"sample {sample.sample_id}")
                coverage.append(Coverage.of_rows(trace.valid, prompt_length=len(prompt)))
                samples.append(sample)
                traces.append(trace)
        covered = Coverage.total(coverage)
        covered.require(1.0)  # the token sampled last is never fed, so its row does not count

        # 4. Tokens, advantages and routes go through one row index, so none can shift alone.
        batch = build_microbatch(0, samples)
        routes = slice_routes(traces, batch.router_index, layers=tuple(routers))
        owners = RowOwners(sample=batch.sample_ids, position=batch.positions)

        # 5. Old log-probabilities, under replay. What the routers would choose now shows whether
        # the routes are those of their rows; if not, the guard raises before anything is learned.
        scope = ReplayScope(routers, {0: routes}, owners={0: owners}, keeps_live=True)
        with torch.no_grad(), scope.open():
            old = sampled_logprobs(model, batch, scope)
        report = check_routes(
            routes.expert_ids.swapaxes(0, 1),
            scope.watched(0).live_ids,
            batch.sample_ids,
            valid=routes.valid,
            num_experts=routes.num_experts,
            guard=guard,
        )
        report.raise_if_misaligned(f"step {step}")

        # 6. Updates. Replayed experts are weighed by the model's own logits, so routers learn too.
        per_token = [np.full(s.completion_length, s.advantage, dtype=np.float32) for s in samples]
        advantage = torch.from_numpy(batch.place(per_token, fill=0.0)[batch.predicts_sampled])
        for _ in range(NUM_UPDATES):
            scope = ReplayScope(routers, {0: routes})
            with scope.open():  # and backward: recomputation replays what its forward pass did
                ratio = torch.exp(sampled_logprobs(model, batch, scope) - old)
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                optimizer.zero_grad()
                (-torch.minimum(ratio * advantage, clipped * advantage).mean()).backward()
            optimizer.step()

        # 7. The engine goes on with the new weights.
        engine.load_weights(export_hf_weights(chunks), policy_version=step + 1)
        rollout = batch.place([s.rollout_logprobs for s in samples], fill=0.0)
        gap = old - torch.from_numpy(rollout[batch.predicts_sampled])
        figures = {
            "reward": float(rewards.mean()),
            "coverage": covered.fraction,
            "agreement": float(np.mean(list(report.agreement.values()))),
            "k3": float((torch.exp(gap) - 1 - gap).mean()),  # the mismatch that is left
        }
        print(f"step {step}:", ", ".join(f"{name} {x:.4g}" for name, x in figures.items()))
        history.append(figures)
    return history


if __name__ == "__main__":
    train(EmbeddedEngine(CHECKPOINT, dtype="bfloat16"), num_steps=3)
