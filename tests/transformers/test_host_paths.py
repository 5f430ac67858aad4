"""The shortcuts on a CPU against transformers' own functions, in every family."""

import pytest
import torch

from moe_replay.transformers import host_paths
from moe_replay.transformers.host_paths import NAME, attention_forward, use_host_paths


def logits_of(model, token_ids, mask):
    """Return the logits of a prefill of five tokens, and of the two that follow one by one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    found = []
    with torch.inference_mode():
        for start, end in ((0, 5), (5, 6), (6, 7)):
            output = model(
                token_ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            found.append(output.logits)
    logits = torch.cat(found, dim=1)
    return logits if mask is None else logits[mask.bool()]


def padding():
    """Return a mask that leaves out the first two tokens of the second sequence."""
    return torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [None, padding()], ids=["whole", "padded"])
def test_logits_are_those_of_the_plain_model(model, token_ids, mask):
    model.eval().set_experts_implementation("grouped_mm")
    plain = logits_of(model, token_ids, mask)
    use_host_paths(model)
    assert model.config._experts_implementation == NAME
    torch.testing.assert_close(logits_of(model, token_ids, mask), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", ["attention", "experts"])
def test_a_wrong_shortcut_is_seen_in_the_logits(qwen, token_ids, monkeypatch, broken):
    """Both functions run: spoiling either changes the logits of the tokens that follow."""
    qwen.eval().set_experts_implementation("grouped_mm")
    plain = logits_of(qwen, token_ids, None)
    name = f"{broken}_forward"
    stock = getattr(host_paths, name)

    def spoiled(*args, **options):
        found = stock(*args, **options)
        return (found[0] * 1.01, None) if broken == "attention" else found * 1.01

    monkeypatch.setattr(host_paths, name, spoiled)
    use_host_paths(qwen)
    difference = (logits_of(qwen, token_ids, None) - plain).abs().amax(dim=(0, 2))
    assert difference[-1] > 1e-4


def test_attention_to_one_token_is_the_softmax_over_keys_that_are_not_masked():
    """One query of 2 heads over one key head: worked by hand with scores 0 and ln 3."""
    query = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    key = torch.tensor([0.0, 1.0, 9.0]).log1p().view(1, 1, 3, 1)
    value = torch.tensor([0.0, 1.0, 100.0]).view(1, 1, 3, 1)
    mask = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    found, _ = attention_forward(torch.nn.Module(), query, key, value, mask, scaling=1.0)
    # exp(ln 2) of exp(0) + exp(ln 2) is 2/3, exp(2 ln 2) of 1 + 4 is 4/5.
    torch.testing.assert_close(found, torch.tensor([2 / 3, 4 / 5]).view(1, 1, 2, 1))


def test_a_model_in_bfloat16_stays_as_it_is(qwen):
    qwen.to(torch.bfloat16).set_experts_implementation("grouped_mm")
    before = qwen.config._attn_implementation
    use_host_paths(qwen)
    assert (qwen.config._attn_implementation, qwen.config._experts_implementation) == (
        before,
        "grouped_mm",
    )
