"""GRPO in TRL with routing replay: three lines more than without.

    python examples/trl_grpo.py --mode R3             # 20 steps of the demo's model, on a CPU
    python examples/trl_grpo.py --mode R3 --vllm      # sampled by a vLLM in the same process

The last line gives the means over the run: the gap between the engine's log-probabilities and the
trainer's (k3, in nats), the share of rows that were replayed, and the share of expert slots on
which replayed and live routes agree.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym
import torch
from datasets import Dataset
from reasoning_gym.utils import extract_answer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from moe_replay.trl import ReplayGRPOTrainer  # 1: instead of trl.GRPOTrainer

CHECKPOINT = Path(__file__).parents[1] / "recipes" / "demo" / "model"
TASK = {"min_terms": 5, "max_terms": 5, "max_digits": 1}
SHOWN = ("rollout_correction/k3_kl", "rollout_correction/k3_kl_live", "replay/coverage")
SHOWN += ("replay/agreement", "replay/agreement_min_sample", "reward")


def main() -> None:
    """Train, and print what the run saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["disabled", "R2", "R3"], default="R3")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM in this process")
    parser.add_argument("--off-policy", action="store_true", help="four updates a generation")
    options = parser.parse_args()
    torch.set_num_threads(1)

    task = reasoning_gym.create_dataset("chain_sum", size=8 * options.steps, seed=7, **TASK)
    rows = [
        {"prompt": [{"role": "user", "content": i["question"]}], "item": n}
        for n, i in enumerate(task)
    ]

    def reward(completions: list, item: list[int], **_: object) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [
            task.score_answer(extract_answer(t), task[n]) for t, n in zip(texts, item, strict=True)
        ]

    trainer = ReplayGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(CHECKPOINT),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        router_replay_mode=options.mode,  # 2
        measure_live_gap=True,  # 3: only for the comparison
        args=GRPOConfig(
            output_dir="out/trl",
            max_steps=options.steps,
            learning_rate=options.lr,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1 if options.off_policy else 4,
            steps_per_generation=4,
            num_generations=4,
            max_completion_length=24,
            use_vllm=options.vllm,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.05,
            vllm_max_model_length=128,
            bf16=False,
            gradient_checkpointing=False,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.train()
    found = {}
    for name in SHOWN:
        values = [line[name] for line in trainer.state.log_history if name in line]
        if values:
            found[name] = min(values) if "min" in name else sum(values) / len(values)
    print(json.dumps({"mode": options.mode, "steps": trainer.state.global_step, **found}))


if __name__ == "__main__":
    main()
