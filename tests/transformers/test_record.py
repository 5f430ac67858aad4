import numpy as np
import pytest
import torch
from torch import nn

from moe_replay.errors import ReplayScopeError, UnsupportedError
from moe_replay.routing.reference import RouterRule, ScoreFunction, live_ids
from moe_replay.testing.tiny_models import write_tiny_checkpoint
from moe_replay.transformers import find_routers, record_routes


class Router(nn.Module):
    """A router that chooses by these scores, whatever it is given."""

    def __init__(self, scores=None, num_experts=4, top_k=2):
        super().__init__()
        self.scores, self.num_experts, self.top_k = scores, num_experts, top_k

    def forward(self, x):
        weights, ids = torch.topk(self.scores, self.top_k, dim=-1)
        return self.scores, weights, ids


class Block(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.experts, self.gate = nn.Identity(), gate

    def forward(self, x):
        self.gate(x)
        return x


def stack(*gates):
    """Return a model whose layers hold these routers."""
    model = nn.Module()
    model.layers = nn.ModuleList(Block(gate) for gate in gates)
    model.forward = lambda x: [layer(x) for layer in model.layers]
    return model


def scores(rows, num_experts=4):
    return torch.rand(rows, num_experts, generator=torch.Generator().manual_seed(0))


def test_layers_are_numbered_by_their_place_among_all_layers(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=4, mlp_only_layers=[0, 2])
    sites = find_routers(AutoModelForCausalLM.from_pretrained(path))
    assert [site.layer for site in sites] == [1, 3]
    assert [site.path for site in sites] == ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]
    assert {(site.num_experts, site.topk) for site in sites} == {(16, 4)}


def rule_of(config):
    """Return the reference rule of a tiny model."""
    sigmoid = config.model_type in (
        *("deepseek_v3", "glm4_moe", "glm4_moe_lite"),
        *("dots1", "minimax_m2"),
    )
    grouped = sigmoid and getattr(config, "n_group", 1) > 1
    return RouterRule(
        num_experts=16,
        topk=4,
        score_function=ScoreFunction.SIGMOID if sigmoid else ScoreFunction.SOFTMAX,
        normalise=True,
        num_groups=config.n_group if grouped else None,
        groups_per_token=config.topk_group if grouped else None,
    )


def test_routes_are_those_of_the_reference_router(model, token_ids):
    with torch.no_grad(), record_routes(model) as recorder:
        logits = model(token_ids, output_router_logits=True).router_logits
    routes = recorder.take()
    assert recorder.layers == (0, 1)
    for site in find_routers(model):
        held = (*site.block.named_parameters(), *site.block.named_buffers())
        bias = next((b for name, b in held if name.endswith("e_score_correction_bias")), None)
        expected = live_ids(
            logits[site.layer].double().numpy(),
            rule_of(model.config),
            None if bias is None else bias.detach().double().flatten().numpy(),
        )
        got = routes[:, site.layer].sort().values
        assert got.tolist() == np.sort(expected).tolist()


def test_rows_are_flattened_batch_first(qwen, token_ids):
    with torch.no_grad(), record_routes(qwen) as recorder:
        qwen(token_ids)
        both = recorder.take()
        qwen(token_ids[1:])
        second = recorder.take()
    assert both[7:].tolist() == second.tolist()


def test_forwards_between_two_takes_follow_each_other(qwen, token_ids):
    with torch.no_grad(), record_routes(qwen) as recorder:
        qwen(token_ids[:1])
        qwen(token_ids[1:])
        apart = recorder.take()
        qwen(token_ids)
        assert apart.tolist() == recorder.take().tolist()


def test_nothing_is_recorded_after_the_scope(qwen, token_ids):
    with record_routes(qwen) as recorder:
        pass
    qwen(token_ids)
    with pytest.raises(ReplayScopeError, match="counts of rows"):
        recorder.take()


def test_a_model_is_as_before_after_an_exception(qwen, token_ids):
    before = {name: dict(vars(module)) for name, module in qwen.named_modules()}
    with pytest.raises(KeyError), record_routes(qwen):
        qwen(token_ids)
        raise KeyError
    assert {name: vars(module) for name, module in qwen.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in qwen.modules())


def test_another_model_of_the_process_is_not_recorded(qwen, token_ids):
    from copy import deepcopy

    other = deepcopy(qwen)
    with record_routes(qwen) as recorder:
        other(token_ids)
    with pytest.raises(ReplayScopeError):
        recorder.take()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_recorded_again(qwen, token_ids, reentrant):
    qwen.train()
    qwen.activation_checkpointing_enable({"use_reentrant": reentrant})
    qwen.enable_input_require_grads()
    with record_routes(qwen) as recorder:
        qwen(token_ids).logits.sum().backward()
    assert len(recorder.take()) == 14


def test_a_dense_model_has_no_routers_and_cannot_be_recorded(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=1, mlp_only_layers=[0])
    model = AutoModelForCausalLM.from_pretrained(path)
    assert find_routers(model) == ()
    with pytest.raises(UnsupportedError, match="dense"), record_routes(model):
        pass


def test_an_expert_block_without_router_is_named():
    with pytest.raises(UnsupportedError, match=r"expert block layers\.0 \(Block\)"):
        find_routers(stack(nn.Linear(2, 4)))


def test_routers_of_a_refused_family_are_named():
    class DogeCDMoE(nn.Module):
        pass

    model = nn.Module()
    model.layers = nn.ModuleList([DogeCDMoE()])
    with pytest.raises(UnsupportedError, match=r"layers\.0 is a DogeCDMoE.*product keys"):
        find_routers(model)


def test_routers_of_different_size_are_refused():
    with pytest.raises(UnsupportedError, match=r"\(4, 2\), \(8, 2\)"):
        find_routers(stack(Router(), Router(num_experts=8)))


def test_routers_in_two_stacks_are_refused():
    model = nn.Module()
    model.text, model.vision = stack(Router()), stack(Router())
    with pytest.raises(UnsupportedError, match=r"text\.layers.*vision\.layers"):
        find_routers(model)


def test_routers_that_saw_different_rows_are_refused():
    model = stack(Router(scores(3)), Router(scores(2)))
    with record_routes(model) as recorder:
        model.forward(torch.zeros(3, 2))
    with pytest.raises(ReplayScopeError, match=r"\{0: 3, 1: 2\}"):
        recorder.take()


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, torch.uint8), (512, torch.int32)])
def test_ids_are_as_wide_as_the_model_needs(num_experts, dtype):
    rising = torch.arange(1.0, num_experts + 1)[None]
    model = stack(Router(rising, num_experts=num_experts))
    with record_routes(model) as recorder:
        model.forward(torch.zeros(1, 2))
    routes = recorder.take()
    assert routes.dtype is dtype
    assert routes.tolist() == [[[num_experts - 1, num_experts - 2]]]
