"""A config with impossible values is refused, and code of a checkpoint never runs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_replay.checkpoint.config import load_config, load_generation_config
from moe_replay.checkpoint.facts import read_facts
from moe_replay.checkpoint.tokenizer import load_tokenizer
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.errors import MoeReplayError, RecipeError, UnsupportedError
from moe_replay.megatron.model import read_model_shape
from moe_replay.testing.tiny_models import character_tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 32,
    "num_experts_per_tok": 2,
}


def write(folder: Path, **changed: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    return folder


WRONG = {
    "experts as text": ({"num_experts": "32"}, r"num_experts = '32' \(str\)"),
    "experts as float": ({"num_experts": 32.0}, r"num_experts = 32\.0 \(float\)"),
    "experts as bool": ({"num_experts": True}, r"num_experts = True \(bool\)"),
    "a billion experts": ({"num_experts": 10**9}, "from 0 to 65536"),
    "negative experts": ({"num_experts": -4}, "from 0 to 65536"),
    "two numbers of experts": ({"num_local_experts": 16}, "names of the same number"),
    "top-k above experts": ({"num_experts_per_tok": 33}, "num_experts_per_tok = 33 with 32"),
    "top-k 0": ({"num_experts_per_tok": 0}, "from 1 to 32"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "expected a multiple"),
    "layers": ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    "vocabulary": ({"vocab_size": 10**10}, "vocab_size = 10000000000"),
    "theta of nothing": ({"rope_theta": 0}, "rope_theta = 0"),
    "theta that is no number": ({"rope_theta": float("nan")}, "the number NaN"),
    "nested theta": ({"rope_parameters": {"rope_theta": float("inf")}}, "the number Infinity"),
    "no model_type": ({"model_type": None}, "model_type None, expected the name"),
    "model_type list": ({"model_type": ["x"]}, r"model_type \['x'\]"),
    "unknown model_type": ({"model_type": "evil"}, "'evil', which transformers .* does not know"),
    "what transformers refuses": ({"mlp_only_layers": "all"}, "is rejected by transformers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_r11_a_value_that_no_model_can_have_is_refused(tmp_path, name):
    changed, message = WRONG[name]
    with pytest.raises(RecipeError, match=message):
        load_config(write(tmp_path, **changed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list, expected an object"),
        ('{"rope_theta": 1e400}', "the number 1e400"),
        ('{"a": ' + "[" * 200_000, "nested too deeply|cannot be read"),
    ],
)
def test_r11_a_config_that_is_no_object_of_finite_numbers_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_config(tmp_path)


def test_r11_a_damaged_generation_config_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"generation_config\.json cannot be read"):
        load_generation_config(tmp_path)


@pytest.mark.parametrize("place", ["top", "nested"])
def test_t19_a_quantization_config_is_refused(tmp_path, place):
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    changed = quantized if place == "top" else {"text_config": quantized}
    with pytest.raises(UnsupportedError, match=r"quantized checkpoint .*'fp8'"):
        load_config(write(tmp_path, **changed))


def test_t21_a_nested_language_model_is_named_for_what_it_is(tmp_path):
    nested = {key: value for key, value in CONFIG.items() if key != "model_type"}
    config = {
        "model_type": "qwen3_vl_moe",
        "text_config": {**nested, "model_type": "qwen3_vl_moe_text", "num_experts": 128},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError,
        match=r"multimodal model, 'qwen3_vl_moe': .*qwen3_vl_moe_text', 128 experts",
    ):
        read_model_shape(tmp_path)


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
class C(Qwen3MoeConfig): pass
class M(Qwen3MoeForCausalLM): pass
class T(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("model_type", ["evil", "qwen3_moe"])
def test_r4_code_of_a_checkpoint_never_runs_and_nobody_is_asked(tmp_path, monkeypatch, model_type):
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    write(tmp_path, model_type=model_type, auto_map=auto_map)
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "evil.T"]}, "tokenizer_class": "T"}
    character_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for read in (
        load_config,
        read_model_shape,
        read_facts,
        load_tokenizer,
        lambda path: EmbeddedEngine(path, dtype="float32"),
    ):
        try:
            read(tmp_path)
        except MoeReplayError as error:
            assert "trust_remote_code" not in str(error)
            if model_type == "evil" and read is not load_tokenizer:
                assert "evil" in str(error)
    assert not marker.exists()
    assert sys.stdin.read() == "y\n" * 9
