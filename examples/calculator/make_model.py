"""Make the calculator example's data and its tiny Qwen3-MoE model, which seldom calls its tool.

A person runs it once; the result is shipped next to this file. The model reads
``<tools>multiply<user>37*46=<assistant>`` and knows two ways to answer::

    <answer>1512</answer><eos>                               terse: mostly wrong
    <tool_call>{"name": "multiply", "arguments": {"a": 37, "b": 46}}</tool_call><eos>
    <tool>1702<assistant><answer>1702</answer><eos>          by the tool: mostly right

That calling the tool pays is left for GRPO to find out.

In: a seed.
Out: ``model/`` (config, tokenizer, float32 safetensors), ``train.jsonl``, ``eval.jsonl``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM


def _script_of_the_demo() -> ModuleType:
    """Return the demo's script, which has this one's name, as a module."""
    path = Path(__file__).parents[2] / "recipes" / "demo" / "make_model.py"
    spec = importlib.util.spec_from_file_location("demo_make_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look up their module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


demo = _script_of_the_demo()
EOS = demo.EOS
ROLES = ("<tools>", "<user>", "<assistant>", "<tool>")
# Pieces that are one token each; all other text is one token a byte.
CALL = ('<tool_call>{"name": "multiply", "arguments": {"a": ', ', "b": ', "}}</tool_call>")
PIECES = (*CALL, "<answer>", "</answer>", "multiply")
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 600, 64, 2e-3, 50
# The tool first, and terse answers only at the end: they are quick to learn.
TOOL_ONLY_FRAC, TERSE_FRAC = 0.85, 0.75
NUM_HELD_OUT, NUM_TRAIN = 128, 512

Factors = tuple[int, int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few pieces, with a chat template that shows tools."""
    return demo.byte_tokenizer(ROLES, PIECES, chat_template=CHAT_TEMPLATE, model_max_length=256)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """Return a random Qwen3-MoE of 0.3 million parameters: 4 layers of 8 experts, 2 a token."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.08,
    }
    return demo.random_model(tokenizer, seed, sizes=sizes, generation={})


def lesson(factors: Factors, *, by_tool: bool) -> list[tuple[str, bool]]:
    """Return pieces of a conversation, and whether the model is to learn each."""
    a, b = factors
    answer = (f"<answer>{a * b}</answer>{EOS}", True)
    start = (f"<tools>multiply<user>{a}*{b}=<assistant>", False)
    if not by_tool:
        return [start, answer]
    call = f"{CALL[0]}{a}{CALL[1]}{b}{CALL[2]}{EOS}"
    return [start, (call, True), (f"<tool>{a * b}<assistant>", False), answer]


def batch_of(
    tokenizer: PreTrainedTokenizerFast, lessons: list[list[tuple[str, bool]]]
) -> dict[str, torch.Tensor]:
    """Return padded conversations with labels on the model's own tokens."""
    ids, labels = [], []
    for pieces in lessons:
        parts = [(tokenizer(text).input_ids, learns) for text, learns in pieces]
        ids.append([token for part, _ in parts for token in part])
        labels.append([token if learns else -100 for part, learns in parts for token in part])
    width = max(map(len, ids))

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    return {
        "input_ids": padded(ids, tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": padded(labels, -100),
    }


def warm_start(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[Factors],
    seed: int,
) -> None:
    """Teach the tool, then terse answers beside it, with the routers' load-balancing loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / STEPS)) / 2,
    )
    model.train()
    for step in range(STEPS):
        terse_frac = 0.0 if step < TOOL_ONLY_FRAC * STEPS else TERSE_FRAC
        lessons = [
            lesson(rng.choice(pairs), by_tool=rng.random() >= terse_frac) for _ in range(BATCH_SIZE)
        ]
        loss = model(**batch_of(tokenizer, lessons), output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Write the data and the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(options.seed).shuffle(pairs)
    held_out, rest = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    for name, chosen in (("eval", held_out), ("train", rest[:NUM_TRAIN])):
        rows = [json.dumps({"prompt": f"{a}*{b}=", "answer": str(a * b)}) for a, b in chosen]
        (options.output / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    warm_start(model, tokenizer, rest, options.seed)
    model.save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
