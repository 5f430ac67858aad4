"""Defects by which multi-token-prediction layers are taken for decoder layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_replay.megatron.chunks import moe_layers
from moe_replay.megatron.layout import initialize
from moe_replay.megatron.model import read_model_shape, transformer_config
from moe_replay.megatron.replay import ReplayScope
from moe_replay.megatron.upstream import compat
from moe_replay.routing import RouteSlice
from moe_replay.testing.layouts import layout
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

pytestmark = pytest.mark.ranks
NUM_EXPERTS, TOPK = 16, 4
SEED = 61


def spelled(layer: int) -> tuple[int, ...]:
    """Return the experts that spell a decoder layer."""
    return tuple(sorted((layer + step) % NUM_EXPERTS for step in (0, 1, 3, 7)))


@pytest.fixture(scope="session")
def dense_first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3-MoE checkpoint of four layers, one dense, as many as MTP layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("four"), mlp_only_layers=[0])


def _mtp_model(checkpoint: Path) -> Any:
    """Build a model with one multi-token-prediction layer after its decoder, at random."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    initialize(layout())
    torch.manual_seed(SEED)
    shape = read_model_shape(checkpoint)
    config = transformer_config(
        shape, layout(), overrides={"mtp_num_layers": 1, "perform_initialization": True}
    )
    spec = compat.decoder_block_spec(
        config, vp_stage=None, all_heads_qk_norm=False, grouped_experts=False
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    model.eval()
    return model


def _mtp_router(model: Any) -> Any:
    (layer,) = model.mtp.layers
    inner = getattr(layer, "mtp_model_layer", None) or layer.transformer_layer
    return inner.mlp.router


def _replayed_beside_mtp(checkpoint: Path, also_own_mtp: bool) -> dict[str, Any]:
    """Replay the decoder, or, planted, give the prediction layer the routes of layer 1 too."""
    model = _mtp_model(checkpoint)
    routers, extra = moe_layers([model]), _mtp_router(model)
    owned = {**routers, 4: extra} if also_own_mtp else routers
    tokens = torch.arange(12)[None] % 90 + 4
    spelling = [spelled(1 if layer == 4 else layer) for layer in owned]
    routes = RouteSlice(
        expert_ids=np.tile(np.array(spelling, dtype=np.uint8)[:, None], (1, 12, 1)),
        valid=np.ones(12, dtype=bool),
        layers=tuple(owned),
        num_experts=NUM_EXPERTS,
    )
    seen: dict[str, Any] = {"layers": tuple(routers)}
    hooked = {**{str(layer): router for layer, router in routers.items()}, "mtp": extra}
    for name, router in hooked.items():

        def note(module: Any, args: Any, output: Any, name: str = name) -> None:
            logits = module.gating(args[0]).flatten(0, -2)
            seen[name] = np.stack([np.flatnonzero(row) for row in output[1].numpy()])
            seen[f"{name} live"] = logits.topk(TOPK).indices.sort().values.numpy()

        router.register_forward_hook(note)
    scope = ReplayScope(owned, {0: routes})
    with torch.no_grad(), scope.open(), scope.microbatch(0):
        model(
            input_ids=tokens,
            position_ids=torch.arange(12)[None],
            attention_mask=None,
            labels=tokens,
        )
    return seen


@pytest.fixture(scope="module")
def beside_mtp(dense_first: Path) -> dict[str, Any]:
    """Return what the routers of a decoder that replays, and of its prediction layer, chose."""
    return run_ranks(_replayed_beside_mtp, 1, dense_first, False)[0]


def test_b3_the_router_of_a_prediction_layer_stays_live_while_the_decoder_replays(beside_mtp):
    assert (beside_mtp["mtp"] == beside_mtp["mtp live"]).all()
    for layer in (1, 2, 3):
        assert (beside_mtp[str(layer)] == spelled(layer)).all()
        assert (beside_mtp[f"{layer} live"] != spelled(layer)).any()


def test_b3_control_a_scope_that_owned_it_too_would_force_a_decoder_layers_routes(dense_first):
    (seen,) = run_ranks(_replayed_beside_mtp, 1, dense_first, True)
    assert (seen["mtp"] == spelled(1)).all()
    assert (seen["mtp"] != seen["mtp live"]).any()


def test_b2_the_routers_of_a_model_with_as_many_prediction_as_dense_layers_are_its_decoders(
    beside_mtp,
):
    assert beside_mtp["layers"] == (1, 2, 3)
    assert all((beside_mtp[str(layer)] == spelled(layer)).all() for layer in (1, 2, 3))


def test_b2_control_counted_with_the_prediction_layer_its_routers_are_as_many_as_its_layers(
    beside_mtp,
):
    """Four routers and four layers of routes: the count fits, yet each takes its neighbour's."""
    routers = [name for name in beside_mtp if f"{name} live" in beside_mtp]
    assert sorted(routers) == ["1", "2", "3", "mtp"]
    assert all(name != str(layer) for layer, name in enumerate(sorted(routers)))
