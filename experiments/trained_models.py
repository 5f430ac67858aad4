"""A trained mixture-of-experts model and its dense twin, for experiments that need real routers.

Both are language models of reasoning-gym texts: 8 layers, hidden size 128, attention alike; one has
32 experts of which a token takes 4, the other one MLP as wide as these 4 together. Same texts, same
steps, same seed.

    python experiments/trained_models.py     # writes runs/reproduction/{moe,twin}, some minutes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

# Read once, when torch is imported: a thread that spins while it waits starves the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import reasoning_gym
import torch
from commits import commit
from reproduction_results import keep_row
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "reproduction"
FAMILIES = (
    "gsm_symbolic",
    "letter_counting",
    "family_relationships",
    "leg_counting",
    "time_intervals",
    "chain_sum",
)
# Item i of a dataset depends on seed + i alone.
ITEM_SEEDS = {"train": 0, "held_out": 900_000_000}
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
VOCAB_SIZE = 768
MAX_LENGTH = 160

LAYERS, EXPERTS, TOPK, EXPERT_WIDTH = 8, 32, 4, 24
STEPS, BATCH_SIZE, WARMUP_STEPS, PEAK_LEARNING_RATE = 700, 24, 50, 2e-3
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": TOPK * EXPERT_WIDTH,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    # Wider than the usual 0.02: at this size routers then choose, and the model learns, sooner.
    "initializer_range": 0.06,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def texts(purpose: str, count: int) -> list[str]:
    """Return questions with their answers, of all families in turn."""
    each = math.ceil(count / len(FAMILIES))
    first = ITEM_SEEDS[purpose]
    datasets = [reasoning_gym.create_dataset(name, seed=first, size=each) for name in FAMILIES]
    found = [
        f"{USER}{dataset[number]['question']}{ASSISTANT}{dataset[number]['answer']}{EOS}"
        for number in range(each)
        for dataset in datasets
    ]
    return found[:count]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of some training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False) for text in (PAD, EOS, USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts("train", 3000), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
    )


def build_model(kind: str, seed: int) -> torch.nn.Module:
    """Return a random model, ``moe`` or ``twin``."""
    torch.manual_seed(seed)
    if kind == "twin":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    else:
        model = Qwen3MoeForCausalLM(moe_config())
        model.set_experts_implementation("grouped_mm")
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0)
    return model


def moe_config(**changes: object) -> Qwen3MoeConfig:
    """Return the config of the mixture of experts, some fields replaced."""
    fields = SHAPE | {
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOPK,
        "moe_intermediate_size": EXPERT_WIDTH,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.02,
    }
    return Qwen3MoeConfig(**(fields | changes))


def batches(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], seed: int
) -> list[dict[str, torch.Tensor]]:
    """Return batches of documents of about equal length, in random order, padded on the right."""
    encoded = tokenizer(list(documents), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    rng = random.Random(seed)
    rng.shuffle(encoded)
    found = []
    for start in range(0, len(encoded), 16 * BATCH_SIZE):
        pool = sorted(encoded[start : start + 16 * BATCH_SIZE], key=len)
        for at in range(0, len(pool) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = tokenizer.pad({"input_ids": pool[at : at + BATCH_SIZE]}, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            found.append({**batch, "labels": labels})
    rng.shuffle(found)
    return found


def train(model: torch.nn.Module, lessons: Sequence[dict[str, torch.Tensor]]) -> None:
    """Train in place, one pass over ``lessons``; routers with their load-balancing loss."""
    options = {"output_router_logits": True} if isinstance(model, Qwen3MoeForCausalLM) else {}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    steps = len(lessons)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        ),
    )
    began = time.process_time()
    model.train()
    for step, batch in enumerate(lessons):
        loss = model(**batch, **options).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.process_time() - began
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {spent:.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, lessons: Sequence[dict[str, torch.Tensor]]) -> float:
    """Return nats a token."""
    model.eval()
    total, count = 0.0, 0
    for batch in lessons:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def write(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_for_megatron(twin: Path, folder: Path) -> None:
    """Write the twin's weights once more, as a Qwen3-MoE all of whose layers are dense.

    Megatron is tested here with families of mixtures of experts alone, and a dense layer of a
    Qwen3-MoE has the names and the arithmetic of a Qwen3 layer. `precision.py` checks that both
    give the same log-probabilities in float32.
    """
    shutil.copytree(twin, folder, dirs_exist_ok=True)
    config = moe_config(mlp_only_layers=list(range(LAYERS)))
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)


def make(folder: Path, *, seed: int, steps: int) -> None:
    """Train both models and write them, with what was measured in ``made.json``."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    lessons = batches(tokenizer, texts("train", steps * BATCH_SIZE), seed)
    held_out = batches(tokenizer, texts("held_out", 16 * BATCH_SIZE), seed)
    made: dict[str, float] = {"seed": seed, "steps": len(lessons)}
    made["train_tokens"] = int(sum(batch["attention_mask"].sum() for batch in lessons))
    for kind in ("moe", "twin"):
        began = time.process_time()
        model = build_model(kind, seed)
        made[f"{kind}_parameters"] = sum(each.numel() for each in model.parameters())
        train(model, lessons)
        made[f"{kind}_loss"] = held_out_loss(model, held_out)
        made[f"{kind}_processor_s"] = time.process_time() - began
        write(model, tokenizer, folder / kind)
    write_for_megatron(folder / "twin", folder / "twin-megatron")
    keep_row("trained_models", {"row": f"seed {seed}", "commit": commit(), **made})
    # Written last, so that this file exists only if both models do.
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(made)


def prompts(folder: Path, count: int, *, length: int) -> list[list[int]]:
    """Return the first tokens of held-out questions, as ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "moe")
    encoded = tokenizer(texts("held_out", count))["input_ids"]
    return [ids[:length] for ids in encoded]


def main() -> None:
    """Make both models, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where both go")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of texts")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, 24 texts each")
    options = parser.parse_args()
    if (options.folder / "made.json").exists():
        print(f"{options.folder} holds both models; remove it to make them again")
        return
    make(options.folder, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    main()
