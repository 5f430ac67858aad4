import torch

from moe_replay.transformers.cache import growing_cache


def states(batch, tokens, seed):
    return torch.randn(batch, 2, tokens, 3, generator=torch.Generator().manual_seed(seed))


def fill(cache, batch=2):
    """Append five tokens, then one three times, and return all keys and values."""
    for seed, tokens in enumerate((5, 1, 1, 1)):
        held = cache.update(states(batch, tokens, seed), states(batch, tokens, seed + 50), 0)
    return held


def plain(config):
    from transformers import DynamicCache

    return DynamicCache(config=config)


def test_it_holds_what_the_plain_cache_holds(qwen):
    ours, theirs = fill(growing_cache(qwen.config, num_tokens=8)), fill(plain(qwen.config))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_it_grows_past_the_room_it_was_given(qwen):
    cache = growing_cache(qwen.config, num_tokens=5)
    ours, theirs = fill(cache), fill(plain(qwen.config))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_selected_rows_go_on_growing(qwen):
    ours, theirs = growing_cache(qwen.config, num_tokens=9), plain(qwen.config)
    rows = torch.tensor([1, 1, 0])
    for cache in (ours, theirs):
        fill(cache)
        cache.batch_select_indices(rows)
    new = states(3, 1, 9), states(3, 1, 10)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True)
    )


def test_appending_copies_no_older_token(qwen):
    cache = growing_cache(qwen.config, num_tokens=9)
    before = fill(cache)[0].data_ptr()
    assert cache.update(states(2, 1, 9), states(2, 1, 10), 0)[0].data_ptr() == before


def test_its_memory_follows_its_tokens(qwen):
    """Five tokens get room for 16 more, not for a thousand."""
    cache = growing_cache(qwen.config, num_tokens=1000)
    keys, _ = cache.update(states(2, 5, 1), states(2, 5, 2), 0)
    assert keys._base.shape[-2] == 21
    for token in range(95):
        keys, _ = cache.update(states(2, 1, token), states(2, 1, token), 0)
    assert keys.shape[-2] == 100
    assert keys._base.shape[-2] <= 125
