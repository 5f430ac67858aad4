"""GRPO with routing replay in a plain PyTorch loop: one step of the demo's model.

python examples/torch_loop.py
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_replay.transformers import record_generation, replay_traces

CHECKPOINT = Path(__file__).parents[1] / "recipes" / "demo" / "model"
QUESTION = "State the final answer to the following arithmetic problem: 8 + 0 + 7 - 3 - 0 ="


def step(mode: str = "R3", group: int = 8) -> tuple[float, float]:
    """Sample a group, learn from it; return the engine gap (mean k3, in nats) and the loss."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    prompt = prompt["input_ids"].repeat(group, 1)
    start, end = prompt.shape[1], tokenizer.eos_token_id

    with torch.no_grad(), record_generation(model) as recorder:
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=True
        )
    mask = ((ids[:, start:] == end).cumsum(1) - (ids[:, start:] == end).long()) == 0
    mask = torch.cat([torch.ones_like(prompt, dtype=torch.bool), mask], dim=1)
    texts = [row[held].tolist() for row, held in zip(ids, mask, strict=True)]
    found = recorder.sequences(texts, [start] * group)

    rewards = torch.tensor([float(tokenizer.decode(text).count("12")) for text in texts])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    routes = replay_traces(model, [one.trace for one in found], input_ids=ids, attention_mask=mask)
    with routes if mode == "R3" else nullcontext():
        logits = model(ids, attention_mask=mask.long()).logits[:, start - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(2, ids[:, start:, None])[..., 0]
        loss = -(advantages[:, None] * logprobs)[mask[:, start:]].mean()
        loss.backward()
    optimizer.step()

    sampled = torch.cat([torch.from_numpy(one.rollout_logprobs) for one in found])
    gap = logprobs.detach()[mask[:, start:]] - sampled
    return float((torch.expm1(gap) - gap).mean()), float(loss.detach())


if __name__ == "__main__":
    for mode in ("disabled", "R3"):
        gap, loss = step(mode)
        print(f"{mode}: gap {gap:.3g} nats, loss {loss:.4f}")
