"""Which tokens end a completion, collected from every file of a checkpoint that names one.

The files may disagree: a base model's config names the end of a document, its chat template ends
turns with another token. If only one of them counted, some completions would run to their limit, so
all of them count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MARK = "moe-replay"


def stop_tokens(
    generation_config: Any, config: Any, tokenizer: Any | None
) -> dict[int, tuple[str, ...]]:
    """Return stop tokens with their sources: both configs, the tokenizer, its chat template."""
    found: dict[int, tuple[str, ...]] = {}
    for source, named in _named(generation_config, config, tokenizer):
        for token in named if isinstance(named, list | tuple) else [named]:
            if isinstance(token, int):
                found[token] = (*found.get(token, ()), source)
    return found


def _named(generation_config: Any, config: Any, tokenizer: Any | None) -> Iterator[tuple[str, Any]]:
    yield "generation_config.json", getattr(generation_config, "eos_token_id", None)
    yield "config.json", getattr(config.get_text_config(), "eos_token_id", None)
    if tokenizer is not None:
        yield "tokenizer", tokenizer.eos_token_id
        yield "chat template", end_of_turn(tokenizer)


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that a chat template puts after the assistant's answer, if any."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    from jinja2 import TemplateError

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    # A template may reject this chat; the error then shows when a prompt is rendered.
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    _, found, tail = text.rpartition(_MARK)
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = tokenizer.encode(tail.lstrip(), add_special_tokens=False) if found else []
    return int(ids[0]) if ids and ids[0] in special else None


def describe_stop_tokens(tokens: Mapping[int, tuple[str, ...]], tokenizer: Any | None) -> str:
    """Describe stop tokens: ``stops at '<|im_end|>' (151645: config.json, chat template)``."""
    if not tokens:
        return (
            "neither the checkpoint nor rollout.stop_token_ids names a stop token: every completion runs to "
            "rollout.max_completion_length"
        )
    names = []
    for token, sources in tokens.items():
        name = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None else None
        names.append(f"{name or 'token'} ({token}: {', '.join(sources)})")
    return f"stops at {'; '.join(names)}"
