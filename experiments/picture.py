"""The picture of the README: one sampled completion of the demo's model, routed live and replayed.

The engine samples 256 completions in bfloat16; the trainer runs the same tokens in float32, once
with its own routes and once with those of the engine. Shown is the completion with the largest gap
under live routing; the figures are over all of them.

    python experiments/picture.py     # writes docs/assets/replay.svg, 20 s
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.routing import RoutingTrace
from moe_replay.transformers import record_routes, replay_traces

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "recipes" / "demo" / "model"
OUT = HERE.parent / "docs" / "assets" / "replay.svg"
GROUP_SIZE = 8

CELL, ROW, LEFT, WIDTH = 34, 17, 92, 980
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.small { font-size: 11px } .head { font-size: 15px; font-weight: 600 } .mono { font-family: ui-monospace, monospace; font-size: 11px }
.dim { fill: #57606a } .same { fill: #9ecae1 } .one { fill: #f0a35e } .more { fill: #d1495b } .none { fill: #d0d7de } .bar { fill: #d1495b }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .dim { fill: #9198a1 } .same { fill: #2f5d7c } .one { fill: #d98b3f } .more { fill: #e5566b } .none { fill: #30363d } .bar { fill: #e5566b }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A completion, as engine and trainer saw it."""

    token_ids: np.ndarray
    """``[tokens]``, prompt first."""
    num_prompt: int
    """Tokens of the prompt."""
    differing: np.ndarray
    """``[tokens, layers]``, experts of the trainer's live choice that the engine did not use."""
    live: np.ndarray
    """``[sampled]``, log ratio of trainer and engine under live routing, in nats."""
    replayed: np.ndarray
    """The same under replay."""


def requests(num_prompts: int) -> list[Request]:
    """Return prompts of the demo's task."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    task = reasoning_gym.create_dataset(
        "chain_sum", size=num_prompts, seed=1, min_terms=5, max_terms=5, min_digits=1, max_digits=1
    )
    made = []
    for number in range(num_prompts):
        chat = [{"role": "user", "content": task[number]["question"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        made.append(
            Request(
                request_id=number,
                prompt_ids=np.array(ids, dtype=np.int32),
                num_generations=GROUP_SIZE,
            )
        )
    return made


def sample(num_prompts: int) -> list[Scored]:
    """Sample with the engine, and score each completion live and replayed."""
    engine = EmbeddedEngine(MODEL, dtype="bfloat16")
    groups = engine.generate(requests(num_prompts), SamplingParams(max_completion_length=24))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    found = []
    for group in groups:
        for completion in group.completions:
            ids = np.concatenate([group.request.prompt_ids, completion.token_ids])
            start = len(group.request.prompt_ids)
            with torch.no_grad():
                with record_routes(model) as recorder:
                    live = logprobs(model, ids)
                own = recorder.take().numpy()
                with replay_traces(model, [completion.trace], input_ids=ids[None]):
                    replayed = logprobs(model, ids)
            engine_logprobs = completion.rollout_logprobs
            found.append(
                Scored(
                    token_ids=ids,
                    num_prompt=start,
                    differing=differing(completion.trace, own),
                    live=live[start - 1 :] - engine_logprobs,
                    replayed=replayed[start - 1 :] - engine_logprobs,
                )
            )
    return found


def logprobs(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Return ``[tokens - 1]``, the log-probability of every token but the first."""
    tokens = torch.from_numpy(ids).long()[None]
    logits = model(tokens).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, tokens[0, 1:, None])[:, 0].numpy()


def differing(trace: RoutingTrace, own: np.ndarray) -> np.ndarray:
    """Return ``[tokens, layers]``, live experts that the engine did not use; -1 without a route."""
    shared = (own[..., :, None] == trace.expert_ids[..., None, :].astype(own.dtype)).any(-1).sum(-1)
    return np.where(trace.valid[:, None], own.shape[-1] - shared, -1)


def k3(log_ratios: np.ndarray) -> float:
    """Return the mean of r - 1 - log r."""
    return float(np.mean(np.exp(log_ratios) - 1 - log_ratios))


def picture(scored: list[Scored]) -> str:
    """Return the picture as SVG."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shown = max(scored, key=lambda one: k3(one.live))
    names = [tokenizer.decode([token]) for token in shown.token_ids]
    live = np.concatenate([one.live for one in scored])
    replayed = np.concatenate([one.replayed for one in scored])
    flips = np.concatenate([(one.differing[:-1] > 0).ravel() for one in scored])
    top = 60
    parts = [
        text(
            LEFT,
            24,
            "Which experts does the trainer run for the tokens that the engine sampled?",
            "head",
        ),
        text(
            LEFT,
            44,
            f"engine: bfloat16, trainer: float32, same weights; {flips.mean():.1%} of (token, layer) pairs differ",
            "dim",
        ),
    ]
    panels = (
        ("live: the trainer's own choice", shown.differing, shown.live, live),
        ("replayed: the engine's choice", np.minimum(shown.differing, 0), shown.replayed, replayed),
    )
    scale = 44 / np.abs(shown.live).max()
    for title, cells, ratios, every in panels:
        parts.append(
            text(LEFT, top + 12, f"{title} — k3 {k3(every):.1e} over {len(every):,} tokens", "")
        )
        parts.append(tokens(names, shown.num_prompt, top + 32))
        top += 40
        for layer in range(cells.shape[1]):
            parts.append(text(LEFT - 8, top + 13, f"layer {layer}", "small dim end"))
            for at, count in enumerate(cells[:, layer]):
                kind = ("same", "one", "more")[min(count, 2)] if count >= 0 else "none"
                parts.append(box(LEFT + at * CELL, top, CELL - 2, ROW - 2, kind))
            top += ROW
        parts.append(text(LEFT - 8, top + 34, "log ratio", "small dim end"))
        for at, ratio in enumerate(ratios):
            height = abs(float(ratio)) * scale
            x = LEFT + (shown.num_prompt + at) * CELL
            parts.append(box(x, top + 50 - height, CELL - 2, max(height, 1), "bar"))
            if abs(ratio) == np.abs(ratios).max():
                words = f"{np.exp(abs(ratio)):.3g} times {'less' if ratio < 0 else 'more'} likely to the trainer"
                parts.append(text(x + CELL + 4, top + 34, words, "small"))
        top += 66
    for at, (kind, words) in enumerate(
        (
            ("same", "the engine's experts"),
            ("one", "one other expert"),
            ("more", "two or more"),
            ("none", "never fed: no route"),
        )
    ):
        parts.append(box(LEFT + at * 190, top, 14, 14, kind))
        parts.append(text(LEFT + 20 + at * 190, top + 12, words, "small"))
    label = "The trainer's experts beside the engine's for one completion, live and replayed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 24}" role="img" aria-label="{label}">'
        f"<style>{STYLE}.end {{ text-anchor: end }} .middle {{ text-anchor: middle }}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def tokens(names: list[str], num_prompt: int, y: float) -> str:
    """Return the tokens over the columns, those of the prompt dimmed."""
    return "\n".join(
        text(
            LEFT + at * CELL + CELL / 2 - 1,
            y,
            name.strip().strip("<|>/")[:5] or "·",
            "mono middle" + (" dim" if at < num_prompt else ""),
        )
        for at, name in enumerate(names)
    )


def text(x: float, y: float, words: str, kind: str) -> str:
    """Return words whose baseline starts at (x, y), of a class of `STYLE`."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a box whose upper left corner is (x, y), of a class of `STYLE`."""
    return f'<rect x="{x:g}" y="{y:.1f}" width="{width:g}" height="{height:.1f}" rx="2" class="{kind}"/>'


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(picture(sample(num_prompts=32)))
    print(f"picture: {OUT.relative_to(HERE.parent)}")
