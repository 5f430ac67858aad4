"""Tiny checkpoints load everywhere, route unevenly and repeat."""

from __future__ import annotations

import string

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_replay.testing.tiny_models import FAMILIES, character_tokenizer, write_tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_in_transformers(tmp_path, family):
    path = write_tiny_checkpoint(tmp_path, family, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert bool(model(torch.arange(4)[None]).logits.isfinite().all())
    assert AutoTokenizer.from_pretrained(path).vocab_size == model.config.vocab_size


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, again, other = (
        load_file(write_tiny_checkpoint(tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_callers_random_state_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    write_tiny_checkpoint(tmp_path, num_hidden_layers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_tokenizer_is_lossless_on_printable_ascii():
    text = string.printable[:95] + "\n a , b . it 's  two  spaces\n\n"
    tokenizer = character_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_shows_what_it_does_not_know():
    tokenizer = character_tokenizer()
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]
