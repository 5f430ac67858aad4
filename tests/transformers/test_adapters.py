"""Models that PEFT has wrapped are recorded and replayed, with adapters on routers too."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from moe_replay.testing.moe_families import tiny_family
from moe_replay.transformers import find_routers, record_routes, replay_routes

ROWS = 18
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "router parameter": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.gate.weight"],
    },
    "saved router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrapped_model_replays(name: str) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **CONFIGS[name])
    model = peft.get_peft_model(tiny_family("qwen3_moe"), config).eval()
    tokens = torch.randint(3, 64, (2, 9))
    sites = find_routers(model)
    assert [site.layer for site in sites] == [0, 1]
    with torch.no_grad(), record_routes(model) as recorder:
        live = model(input_ids=tokens).logits
    routes = recorder.take()
    valid = torch.ones(ROWS, dtype=torch.bool)
    with replay_routes(model, routes, valid, layers=(0, 1)):
        logits = model(input_ids=tokens).logits
        assert torch.equal(logits, live)
        logits.square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("gate" in n for n in trained) == (name not in ("attention",))
    foreign = (routes.long() + 3) % 8
    with torch.no_grad(), replay_routes(model, foreign, valid, layers=(0, 1)):
        assert (model(input_ids=tokens).logits - live).abs().amax(-1).min() > 1e-4
