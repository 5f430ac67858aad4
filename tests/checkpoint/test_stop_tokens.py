"""Every stop token that a file of the checkpoint names counts, and is shown with its sources."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moe_replay.checkpoint.stop_tokens import describe_stop_tokens, end_of_turn, stop_tokens
from moe_replay.checkpoint.tokenizer import num_known_ids
from moe_replay.testing.tiny_models import VOCAB_SIZE, character_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None = None):
    made = character_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def config(eos):
    made = SimpleNamespace(eos_token_id=eos)
    made.get_text_config = lambda: made
    return made


START, END = VOCAB_SIZE, VOCAB_SIZE + 1


def test_e19_a_base_model_whose_template_alone_ends_turns_stops_there():
    found = stop_tokens(SimpleNamespace(eos_token_id=[2]), config(1), tokenizer(CHATML))
    assert found == {
        2: ("generation_config.json",),
        1: ("config.json", "tokenizer"),
        END: ("chat template",),
    }


def test_e19_absent_files_and_null_tokens_name_nothing():
    assert stop_tokens(None, config(None), None) == {}
    assert stop_tokens(None, config([3, 4]), None) == {3: ("config.json",), 4: ("config.json",)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, END),
        ("{% for m in messages %}{{ m['content'] }} \n<eos>{% endfor %}", 1),
        # What follows the answer is text, nothing, or the opening of something else behind text.
        ("{% for m in messages %}{{ m['content'] }} END{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_e19_the_end_of_a_turn_is_the_special_token_right_behind_the_answer(template, expected):
    assert end_of_turn(tokenizer(template)) == expected


def test_e19_stop_tokens_are_shown_with_who_named_them():
    found = {1: ("config.json", "tokenizer"), END: ("chat template",)}
    words = describe_stop_tokens(found, tokenizer(CHATML))
    assert words == f"stops at <eos> (1: config.json, tokenizer); <|im_end|> ({END}: chat template)"
    assert "every completion runs to" in describe_stop_tokens({}, None)


def test_e18_known_ids_end_behind_the_last_added_token():
    assert num_known_ids(character_tokenizer()) == VOCAB_SIZE
    assert num_known_ids(tokenizer()) == VOCAB_SIZE + 2
