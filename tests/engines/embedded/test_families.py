"""Families beyond those that Megatron trains are sampled, and their routes are the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.types import Request, SamplingParams
from moe_replay.errors import UnsupportedError
from moe_replay.testing.moe_families import tiny_family
from moe_replay.testing.tiny_models import character_tokenizer
from moe_replay.transformers import record_routes

GREEDY = SamplingParams(max_completion_length=4, temperature=0.0)


def checkpoint(path: Path, family: str) -> Path:
    tiny_family(family, vocab_size=128).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "phimoe", "gemma4", "glm_moe_dsa", "dbrx"])
def test_routes_of_a_completion_are_those_of_a_plain_forward(tmp_path, family):
    path = checkpoint(tmp_path, family)
    requests = [
        Request(
            request_id=number,
            prompt_ids=np.arange(5, 5 + length).astype(np.int32),
            num_generations=1,
        )
        for number, length in enumerate((3, 7))
    ]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for group in EmbeddedEngine(path, dtype="float32").generate(requests, GREEDY):
        for completion in group.completions:
            tokens = np.concatenate([group.request.prompt_ids, completion.token_ids])
            with torch.no_grad(), record_routes(model) as recorder:
                model(torch.from_numpy(tokens).long()[None])
            expected = np.sort(recorder.take().numpy()[:-1], axis=-1)
            assert (np.sort(completion.trace.expert_ids[:-1], axis=-1) == expected).all()
            assert len(np.unique(expected)) > 2


def test_a_family_with_a_recurrent_state_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="Qwen3NextForCausalLM has layers with a recurrent"):
        EmbeddedEngine(checkpoint(tmp_path, "qwen3_next"), dtype="float32")
