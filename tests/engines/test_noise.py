from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_replay.engines.checks import check_sampling
from moe_replay.engines.noise import completion_noise, sample_tokens
from moe_replay.engines.types import SamplingParams
from moe_replay.errors import RecipeError

# Probabilities 0.5, 0.2, 0.2, 0.1: their cumulative sums are 0.5, 0.7, 0.9, 1.
LOGITS = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1]))


def draw(uniforms, **settings):
    """Return the ids drawn from LOGITS at these uniforms, and their log-probabilities."""
    drawn = drawn_at(uniforms, **settings)
    return drawn.ids, drawn.rollout_logprobs


def drawn_at(uniforms, **settings):
    """Return all that is known of the draws."""
    noise = torch.tensor(uniforms, dtype=torch.float64)
    settings = {"temperature": 1.0, **settings}
    return sample_tokens(LOGITS.expand(len(uniforms), 4), noise, **settings)


def test_a_token_is_the_inverse_of_the_cumulative_distribution():
    ids, _ = draw([0.0, 0.49, 0.51, 0.69, 0.71, 0.89, 0.91, 0.999])
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_logprobs_are_those_of_the_tokens_drawn():
    _, logprobs = draw([0.1, 0.6, 0.8, 0.95])
    assert torch.allclose(logprobs.exp(), torch.tensor([0.5, 0.2, 0.2, 0.1]))


def test_temperature_sharpens_draw_and_logprob():
    # Squared and renormalised at temperature 0.5: 25, 4, 4, 1 of 34.
    ids, logprobs = draw([25.1 / 34], temperature=0.5)
    assert ids.tolist() == [1]
    assert logprobs.exp().tolist() == pytest.approx([4 / 34])


def test_top_k_keeps_exactly_k_of_equal_tokens():
    # 0.5 and one 0.2 remain: 5/7 and 2/7, the lower id of the two equals.
    ids, _ = draw([0.0, 0.7, 0.72, 0.999999], top_k=2)
    assert ids.tolist() == [0, 0, 1, 1]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    ids, _ = draw([0.0, 0.99], top_p=0.5)
    assert ids.tolist() == [0, 0]
    ids, _ = draw([0.0, 0.99], top_p=0.51)
    assert ids.tolist() == [0, 1]


def test_truncation_leaves_the_logprob_of_the_full_vocabulary():
    _, logprobs = draw([0.3], top_k=1)
    assert logprobs.exp().tolist() == pytest.approx([0.5])


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely():
    # 0.4 of 0.5 is 0.2, which both of 0.2 reach; 0.41 of it neither does.
    ids, _ = draw([0.0, 0.6, 0.999], min_p=0.39)
    assert ids.tolist() == [0, 1, 2]
    ids, _ = draw([0.0, 0.6, 0.999], min_p=0.41)
    assert ids.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("limits", "kept", "mass"),
    [
        ({"top_k": 2}, [0, 1], 0.7),
        ({"top_p": 0.6}, [0, 1], 0.7),
        ({"min_p": 0.3}, [0, 1, 2], 0.9),
        # Of three with 0.9 in all, 0.75 of it is 0.675: the first two reach it.
        ({"top_k": 3, "top_p": 0.75}, [0, 1], 0.7),
        ({"top_k": 3, "min_p": 0.9}, [0], 0.5),
        # Among the known ids 0 and 1; the padding beyond them is cut off too.
        ({"top_k": 1, "num_known_ids": 2}, [0], 0.5),
        ({"top_p": 0.8, "temperature": 0.5}, [0, 1], 29 / 34),
    ],
    ids=str,
)
def test_what_truncation_left_is_known_with_its_mass(limits, kept, mass):
    drawn = drawn_at([0.0, 0.999], **limits)
    assert [each.tolist() for each in drawn.sets()] == [kept, kept]
    logprobs, found = drawn.among_kept()
    assert found.tolist() == pytest.approx([mass, mass])
    # By hand: the probability of the token over that of what was left.
    weights = np.array([0.5, 0.2, 0.2, 0.1]) ** (1 / limits.get("temperature", 1.0))
    weights /= weights.sum()
    assert logprobs.exp().tolist() == pytest.approx(weights[drawn.ids.numpy()] / mass)


@pytest.mark.parametrize(
    "limits",
    [{"top_k": 4}, {"top_p": 0.999}, {"min_p": 0.1}, {"top_k": 2, "num_known_ids": 2}, {}],
    ids=str,
)
def test_where_truncation_cuts_nothing_off_there_is_no_set(limits):
    drawn = drawn_at([0.0, 0.6], **limits)
    assert [each.tolist() for each in drawn.sets()] == [[], []]
    logprobs, mass = drawn.among_kept()
    assert logprobs.tolist() == drawn.rollout_logprobs.tolist()
    assert mass.tolist() == [1.0, 1.0]


def test_temperature_0_takes_the_first_of_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0]])
    noise = torch.tensor([0.99], dtype=torch.float64)
    drawn = sample_tokens(logits, noise, temperature=0.0)
    assert drawn.ids.tolist() == [1]
    assert drawn.rollout_logprobs.item() == pytest.approx(-np.log(2 + np.exp(-2.0)))


def test_a_token_of_no_weight_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    largest = np.nextafter(1.0, 0.0)
    noise = torch.tensor([0.0, largest], dtype=torch.float64)
    assert sample_tokens(logits, noise, temperature=1.0).ids.tolist() == [1, 2]


def test_frequencies_are_the_probabilities():
    seed, count = 5, 20_000
    print("seed", seed)
    noise = completion_noise(seed=seed, request_id=0, completion=0, length=count)
    ids, _ = draw(noise.tolist())
    shares = np.bincount(ids.numpy(), minlength=4) / count
    # Five standard deviations of a share are at most 0.018.
    assert np.abs(shares - [0.5, 0.2, 0.2, 0.1]).max() < 0.018


def test_rows_do_not_depend_on_each_other():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 101, generator=generator)
    noise = torch.rand(64, generator=generator, dtype=torch.float64)
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
    together = sample_tokens(logits, noise, **settings)
    alone = [sample_tokens(logits[r : r + 1], noise[r : r + 1], **settings) for r in range(64)]
    assert together.ids.tolist() == [int(each.ids) for each in alone]
    sets = [each.sets()[0].tolist() for each in alone]
    assert [each.tolist() for each in together.sets()] == sets
    assert 1 <= min(map(len, sets)) < max(map(len, sets)) <= 20


def test_a_longer_stream_of_noise_starts_with_the_shorter():
    key = {"seed": 3, "request_id": 4, "completion": 5}
    short, long = completion_noise(**key, length=7), completion_noise(**key, length=100)
    assert short.tolist() == long[:7].tolist()


def test_streams_of_noise_differ_in_every_part_of_their_key():
    base = {"seed": 3, "request_id": 4, "completion": 5}
    keys = [base, *({**base, name: value + 1} for name, value in base.items())]
    keys.append({"seed": 3, "request_id": 5, "completion": 4})
    drawn = np.concatenate([completion_noise(**key, length=2000) for key in keys])
    assert len(np.unique(drawn)) == len(drawn)


def test_noise_lies_in_the_unit_interval():
    noise = completion_noise(seed=0, request_id=2**64 - 1, completion=0, length=10_000)
    assert noise.min() >= 0
    assert noise.max() < 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_completion_length", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("keeps_candidates", True),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(RecipeError, match=f"sampling.{field} is {value}"):
        check_sampling(replace(SamplingParams(max_completion_length=1), **{field: value}))


def test_settings_in_range_pass():
    check_sampling(SamplingParams(max_completion_length=1, temperature=0.0, top_p=1.0, top_k=0))


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3}, {"top_p": 0.95}, {"temperature": 0.0}], ids=str
)
def test_e18_ids_that_pad_the_vocabulary_are_never_drawn(settings):
    """Known tokens, 0 and 1, are drawn in proportion, with probabilities of the full vocabulary."""
    ids, logprobs = draw([0.0, 0.5, 0.71, 0.72, 0.999], num_known_ids=2, **settings)
    # 0.5 and 0.2 remain: 5/7 and 2/7.
    expected = [0] * 5 if settings.get("temperature") == 0.0 else [0, 0, 0, 1, 1]
    assert ids.tolist() == expected
    assert logprobs.exp().tolist() == pytest.approx([(0.5, 0.2)[n] for n in expected])


def test_e18_a_known_token_is_drawn_even_when_padding_has_all_the_probability():
    logits = torch.tensor([[-2000.0, -2000.0, 0.0]])
    drawn = sample_tokens(
        logits, torch.tensor([0.9], dtype=torch.float64), temperature=1.0, num_known_ids=2
    )
    assert drawn.ids.tolist() == [1]
