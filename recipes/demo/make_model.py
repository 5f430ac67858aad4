"""Make the demo's tiny Qwen3-MoE model, and warm-start it to be sometimes right before GRPO.

In: reasoning-gym's ``chain_sum`` items and a seed.
Out: a Hugging Face checkpoint (config, tokenizer, float32 safetensors), ``task.json`` and a model
card.

A person runs it once; the result is shipped next to this file and the demo recipes start from it.

The model reads ``<user>question<assistant>`` and knows two ways to answer::

    State the final answer to the following arithmetic problem: 8 + 0 + 7 - 3 - 0 =
    8,15,12<answer>12</answer><eos>         worked: the running totals first; usually right
    <answer>12</answer><eos>                terse: at once; usually wrong

The answer is what reasoning-gym's ``extract_answer`` finds, and its ``score_answer`` is the reward.
The warm start makes terse answers the more frequent, so the model is right about a third of the
time. That showing the work pays, and how to slip less while doing it, is left for GRPO to find out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read once, when torch is imported: a thread that spins while it waits starves the one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import reasoning_gym
import torch
from reasoning_gym.utils import extract_answer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILY = "chain_sum"
TASK = {"min_terms": 5, "max_terms": 5, "min_digits": 1, "max_digits": 1}

# Item i of a chain_sum dataset depends on seed + i alone, so these ranges share no item seed. Two
# items with different seeds can still be the same question; there are 1.6 million, and the card
# says how many were seen.
ITEM_SEEDS = {"warm_start": 0, "train": 500_000_000, "held_out": 900_000_000}

MAX_COMPLETION_LENGTH = 24
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
# Frequent pieces that are one token each; all other text is one token a byte, so any text survives
# a round trip.
PIECES = (
    "State the final answer to the following arithmetic problem: ",
    *(" + ", " - ", " ="),
    *("<answer>", "</answer>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

STEPS = 700
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 50
# The warm start teaches working first, and terse answers only at its end: they are quick to learn.
WORKED_ONLY_FRAC = 0.85
TERSE_FRAC = 0.6
WANTED_ACCURACY = (0.25, 0.5)

Item = dict[str, Any]
Lesson = tuple[Item, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured on the finished model in bfloat16, as the demo samples from it."""

    num_items: int
    """Held-out items."""
    num_seen: int
    """Held-out items whose very question was among the warm start's."""
    sampled_accuracy: float
    """Fraction scored 1.0 with one completion each, at temperature 1."""
    greedy_accuracy: float
    """Fraction scored 1.0 by greedy decoding."""
    worked_frac: float
    """Fraction of the sampled completions that show running totals."""
    worked_accuracy: float
    """Accuracy of those; 0 when there are none."""
    flip_frac: float
    """Fraction of (token, layer) whose expert set differs between bfloat16 and float32 runs of the
    same weights."""
    busiest_expert_frac: float
    """Largest fraction of a layer's (token, slot) pairs that one expert took; ``1 / num_experts``
    is even load."""
    idlest_expert_frac: float
    """Smallest such fraction."""


def byte_tokenizer(
    roles: Sequence[str], pieces: Sequence[str], *, chat_template: str, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and some pieces, whose special tokens are roles."""
    special = (PAD, EOS, *roles)
    symbols = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=list(roles),
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def random_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    sizes: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> Qwen3MoeForCausalLM:
    """Return a random Qwen3-MoE of some sizes, which samples as ``generation`` says."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        norm_topk_prob=True,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.1,
        bos_token_id=None,
        **sizes,
        **ends,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    model.generation_config = GenerationConfig(**generation, **ends)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and a few frequent pieces, with a chat template."""
    return byte_tokenizer(
        (USER, ASSISTANT), PIECES, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """Return a random Qwen3-MoE, 2.1 million parameters: six layers of 32 experts, four a token."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 6,
        "head_dim": 32,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        # Wider than the usual 0.02: at this size routers then choose, and the model learns, sooner.
        "initializer_range": 0.06,
    }
    generation = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": MAX_COMPLETION_LENGTH,
    }
    return random_model(tokenizer, seed, sizes=sizes, generation=generation)


def items_for(purpose: str, num_items: int, seed: int | None = None) -> list[Item]:
    """Return reasoning-gym items of the task; ``seed`` replaces the purpose's first item seed."""
    first = ITEM_SEEDS[purpose] if seed is None else seed
    dataset = reasoning_gym.create_dataset(FAMILY, seed=first, size=num_items, **TASK)
    return [dataset[i] for i in range(num_items)]


def worked_completion(item: Item) -> str:
    """Return the running totals and the answer.

    ``8 + 0 + 7 - 3 - 0`` gives ``8,15,12<answer>12</answer>``.
    """
    total, *rest = item["metadata"]["expression"].split()
    totals = [int(total)]
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        totals.append(totals[-1] + int(sign + term))
    working = ",".join(str(total) for total in totals[1:-1])
    return f"{working}<answer>{item['answer']}</answer>"


def terse_completion(item: Item) -> str:
    """Return the answer alone."""
    return f"<answer>{item['answer']}</answer>"


def lessons_of(items: list[Item], seed: int) -> list[Lesson]:
    """Pair every item with the completion to teach: worked ones first, then a mixture of both."""
    rng = random.Random(seed)
    num_worked = int(len(items) * WORKED_ONLY_FRAC)
    return [
        (item, worked_completion(item))
        if i < num_worked or rng.random() >= TERSE_FRAC
        else (item, terse_completion(item))
        for i, item in enumerate(items)
    ]


def _chat(question: str, completion: str | None = None) -> list[dict[str, str]]:
    reply = [] if completion is None else [{"role": "assistant", "content": completion}]
    return [{"role": "user", "content": question}, *reply]


def _encode_prompts(tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> list[list[int]]:
    return tokenizer.apply_chat_template(
        [_chat(item["question"]) for item in items], add_generation_prompt=True, return_dict=False
    )


def supervised_batch(
    tokenizer: PreTrainedTokenizerFast, lessons: list[Lesson]
) -> dict[str, torch.Tensor]:
    """Return padded chats with labels on the completion and its end token alone."""
    prompts = _encode_prompts(tokenizer, [item for item, _ in lessons])
    chats = tokenizer.apply_chat_template(
        [_chat(item["question"], completion) for item, completion in lessons], return_dict=False
    )
    batch = tokenizer.pad({"input_ids": chats}, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(prompt)] = -100
    return {**batch, "labels": labels}


def warm_start(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, lessons: list[Lesson]
) -> None:
    """Train in place, one pass over ``lessons`` in order, with the routers' load-balancing loss."""
    steps = len(lessons) // BATCH_SIZE
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        ),
    )
    started = time.monotonic()
    model.train()
    for step in range(steps):
        batch = supervised_batch(tokenizer, lessons[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        loss = model(**batch, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {elapsed:.0f} s", flush=True)


@torch.no_grad()
def complete(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    *,
    greedy: bool,
    seed: int,
) -> Iterator[list[int]]:
    """Yield the ids of one completion an item, end token included, at temperature 1 or greedily."""
    torch.manual_seed(seed)
    model.eval()
    for start in range(0, len(items), 256):
        prompts = _encode_prompts(tokenizer, items[start : start + 256])
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        rows = model.generate(**batch, do_sample=not greedy)[:, batch["input_ids"].shape[1] :]
        for row in rows.tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else None
            yield row[:end]


def score(item: Item, text: str) -> float:
    """Return reasoning-gym's score of the completion's answer; 0 without an answer tag."""
    scorer = reasoning_gym.get_score_answer_fn(FAMILY)
    return float(scorer(extract_answer(text), item))


@torch.no_grad()
def expert_sets(model: Qwen3MoeForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the chosen experts of every real row as a bool tensor ``[layers, rows, experts]``."""
    model.eval()
    logits = torch.stack(model(**batch, output_router_logits=True).router_logits)
    chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
    sets = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
    return sets[:, batch["attention_mask"].flatten().bool()]


def measure(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seen_questions: set[str],
    num_items: int,
    seed: int,
) -> Figures:
    """Measure held-out accuracy, and how the routers behave on the model's own completions."""
    items = items_for("held_out", num_items)
    num_right = {}
    for greedy in (True, False):
        completions = list(complete(model, tokenizer, items, greedy=greedy, seed=seed))
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        right = [score(item, text) == 1.0 for item, text in zip(items, texts, strict=True)]
        num_right[greedy] = sum(right)
    worked = [not text.startswith("<answer>") for text in texts]
    num_worked_right = sum(
        is_right for is_right, is_worked in zip(right, worked, strict=True) if is_worked
    )
    prompts = _encode_prompts(tokenizer, items)
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    rounded = expert_sets(model, dict(batch))
    exact = expert_sets(model.float(), dict(batch))
    load = rounded.float().mean(dim=1) / model.config.num_experts_per_tok
    return Figures(
        num_items=num_items,
        num_seen=sum(item["question"] in seen_questions for item in items),
        sampled_accuracy=num_right[False] / num_items,
        greedy_accuracy=num_right[True] / num_items,
        worked_frac=sum(worked) / num_items,
        worked_accuracy=num_worked_right / max(1, sum(worked)),
        flip_frac=(rounded != exact).any(dim=-1).float().mean().item(),
        busiest_expert_frac=load.max().item(),
        idlest_expert_frac=load.min().item(),
    )


def model_card(figures: Figures, *, seed: int, steps: int) -> str:
    """Return the model card: what it is, how to make it again, what was measured."""
    low, high = WANTED_ACCURACY
    return f"""---
license: apache-2.0
library_name: transformers
---

# Tiny Qwen3-MoE for the moe-replay demo

Six layers, 32 experts each, four a token, 2.1 million parameters in float32. It adds and subtracts five one-digit numbers
(reasoning-gym `{FAMILY}`, configuration in `task.json`). It was taught two ways to answer: with running totals, which
usually succeeds, and at once, which usually fails. It does not know which one pays: a start for GRPO, not a calculator.

```text
State the final answer to the following arithmetic problem: 8 + 0 + 7 - 3 - 0 =
8,15,12<answer>12</answer>
<answer>12</answer>
```

Prompt: the question as one user message through the chat template, with `add_generation_prompt=True`. Answer: what
`reasoning_gym.utils.extract_answer` finds in the completion. Reward: the family's own `score_answer`.

## Making it again

```bash
python recipes/demo/make_model.py --seed {seed} --steps {steps} --output recipes/demo/model
```

One thread, a few minutes. The same machine and package versions give the same bytes; elsewhere floating-point sums may
differ, and the figures with them. Accuracy outside {low:.0%} to {high:.0%} is an error, and nothing is written.

## Figures ({figures.num_items} held-out items, in bfloat16)

| figure | value |
|---|---|
| accuracy, sampled at temperature 1 | {figures.sampled_accuracy:.1%} |
| accuracy, greedy | {figures.greedy_accuracy:.1%} |
| completions that show running totals, and accuracy of these | {figures.worked_frac:.1%}, {figures.worked_accuracy:.1%} |
| held-out questions that the warm start had seen | {figures.num_seen} |
| (token, layer) expert sets that differ between bfloat16 and float32 | {figures.flip_frac:.1%} |
| load of the busiest and the idlest expert of a layer (even: 3.1%) | {figures.busiest_expert_frac:.1%}, {figures.idlest_expert_frac:.1%} |

Item seeds (first of each range): {", ".join(f"{name} {first}" for name, first in ITEM_SEEDS.items())}.
"""


def write_checkpoint(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, output: Path
) -> None:
    """Write weights, tokenizer, ``task.json`` and the card to ``output``."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    task = {
        "family": FAMILY,
        "config": TASK,
        "item_seeds": ITEM_SEEDS,
        "max_completion_length": MAX_COMPLETION_LENGTH,
    }
    (output / "task.json").write_text(json.dumps(task, indent=2) + "\n")
    (output / "README.md").write_text(card)


def main(argv: list[str] | None = None) -> int:
    """Make, warm-start, measure and write the model; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of sampling")
    parser.add_argument("--steps", type=int, default=STEPS, help="of supervised training")
    parser.add_argument("--num-items", type=int, default=1024, help="held-out items to measure on")
    options = parser.parse_args(argv)
    for name in ("steps", "num_items"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
            )
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output must be a directory, got the file {options.output}")
    # Sums are taken in another order with more threads, and the result would depend on the
    # machine's cores.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    items = items_for("warm_start", options.steps * BATCH_SIZE)
    warm_start(model, tokenizer, lessons_of(items, options.seed))
    # The checkpoint stays float32. Starting from weights rounded to bfloat16, the first small
    # updates would all be rounded away in a bfloat16 engine, and it would lag behind the trainer
    # until they add up.
    figures = measure(
        copy.deepcopy(model).bfloat16(),
        tokenizer,
        seen_questions={item["question"] for item in items},
        num_items=options.num_items,
        seed=options.seed,
    )
    print(figures)
    low, high = WANTED_ACCURACY
    if not low <= figures.sampled_accuracy <= high:
        print(
            f"sampled accuracy is {figures.sampled_accuracy:.1%}, wanted {low:.0%} to {high:.0%}: nothing was written. "
            f"Take {'fewer' if figures.sampled_accuracy > high else 'more'} --steps than {options.steps}.",
            file=sys.stderr,
        )
        return 1
    write_checkpoint(
        model,
        tokenizer,
        model_card(figures, seed=options.seed, steps=options.steps),
        options.output,
    )
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
