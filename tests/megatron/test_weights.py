"""Weights go into Megatron and come out again unchanged, in every family and layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_replay.checkpoint.facts import checkpoint_tensors, read_facts
from moe_replay.checkpoint.files import SafetensorsCheckpoint
from moe_replay.engines.weight_stream import checked_weights
from moe_replay.errors import CheckpointError, EngineError, UnsupportedError
from moe_replay.megatron.families.rules import family_of
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.model import build_model, read_model_shape, transformer_config
from moe_replay.megatron.step_work import even_length
from moe_replay.megatron.weights import (
    WeightExport,
    export_hf_weights,
    load_hf_weights,
    save_hf_checkpoint,
)
from moe_replay.testing.memory import peak_bytes
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

ONE = ParallelLayout()
LAYOUTS = {
    "tp2": (ParallelLayout(tensor_model_parallel_size=2), 2),
    "ep2": (ParallelLayout(expert_model_parallel_size=2), 2),
    "pp2": (ParallelLayout(pipeline_model_parallel_size=2), 2),
    "cp2": (ParallelLayout(context_parallel_size=2), 2),
    "pp2_vpp2": (
        ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        2,
    ),
    "tp2_ep2": (ParallelLayout(tensor_model_parallel_size=2, expert_model_parallel_size=2), 4),
    "pp2_ep2": (ParallelLayout(pipeline_model_parallel_size=2, expert_model_parallel_size=2), 4),
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.mlp.experts.{}.up_proj.weight"


def built(checkpoint: Path, layout: ParallelLayout, dtype: torch.dtype = torch.float32) -> Any:
    initialize(layout)
    shape = read_model_shape(checkpoint)
    return build_model(shape, transformer_config(shape, layout, dtype=dtype))


def round_trip(
    checkpoint: Path, layout: ParallelLayout, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    chunks = built(checkpoint, layout, dtype)
    load_hf_weights(chunks, checkpoint)
    return dict(export_hf_weights(chunks))


def assert_equal_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert different == []
    assert {t.dtype for t in got.values()} == {t.dtype for t in expected.values()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_export_is_bit_equal_on_every_rank_of_a_layout(checkpoint, name):
    layout, world_size = LAYOUTS[name]
    for exported in run_ranks(round_trip, world_size, checkpoint, layout):
        assert_equal_tensors(exported, tensors_of(checkpoint))


@pytest.mark.ranks
def test_export_is_bit_equal_with_shared_experts_under_tensor_parallelism(tmp_path):
    path = write_tiny_checkpoint(tmp_path, "qwen2_moe", num_hidden_layers=2)
    layout, world_size = LAYOUTS["tp2"]
    for exported in run_ranks(round_trip, world_size, path, layout):
        assert_equal_tensors(exported, tensors_of(path))


def test_export_of_a_bfloat16_checkpoint_is_bit_equal(tmp_path):
    path = write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, num_hidden_layers=2)
    (exported,) = run_ranks(round_trip, 1, path, ONE, torch.bfloat16)
    assert_equal_tensors(exported, tensors_of(path))


def test_export_keeps_the_order_of_the_model(checkpoint):
    (exported,) = run_ranks(round_trip, 1, checkpoint, ONE)
    names = list(exported)
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layers == sorted(layers)


def export_then_overwrite(checkpoint: Path) -> bool:
    chunks = built(checkpoint, ONE)
    load_hf_weights(chunks, checkpoint)
    for _, tensor in export_hf_weights(chunks):
        tensor.fill_(torch.nan)
    return any(bool(p.isnan().any()) for p in chunks[0].parameters())


def test_export_yields_copies(checkpoint):
    assert run_ranks(export_then_overwrite, 1, checkpoint) == [False]


def export_peaks(checkpoint: Path) -> dict[str, float]:
    """Return the peaks of planning, of an export, and of one whose tensors are kept."""
    chunks = built(checkpoint, ONE)
    load_hf_weights(chunks, checkpoint)
    exports = []
    plan = peak_bytes(lambda: exports.append(WeightExport(chunks)))
    (export,) = exports

    def one_by_one() -> None:
        for _ in export.tensors():
            pass

    parameters = [parameter.nbytes for parameter in chunks[0].parameters()]
    return {
        "plan": plan,
        "export": peak_bytes(one_by_one),
        "kept": peak_bytes(lambda: list(export.tensors())),
        "weights": sum(parameters),
    }


def found_even_length(checkpoint: Path, layout: ParallelLayout) -> float:
    chunks = built(checkpoint, layout)
    return even_length(WeightExport(chunks), chunks[0])


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(expert_model_parallel_size=2)])
def test_the_even_length_is_the_weights_of_a_token_by_the_width_of_attention(tmp_path, layout):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    path = write_tiny_checkpoint(
        tmp_path / "m",
        **shape,
        num_hidden_layers=2,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        tie_word_embeddings=False,
    )
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    # Queries and output 64 x 128, keys and values 64 x 64, a router, 4 experts of 3 x 64 x 32.
    layer = 2 * 64 * 128 + 2 * 64 * 64 + 64 * 16 + 4 * 3 * 64 * 32
    norms = 2 * 64 + 2 * 32
    weights = 2 * (layer + norms) + 64 + vocabulary * 64
    for found in run_ranks(found_even_length, layout.expert_model_parallel_size, path, layout):
        assert found == pytest.approx(weights / (2 * 4 * 32))


def test_t9_an_export_holds_one_parameter_at_a_time(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=6)
    (found,) = run_ranks(export_peaks, 1, path)
    largest = max(
        sum(t.nbytes for n, t in tensors_of(path).items() if re.fullmatch(pattern, n))
        for pattern in (
            r"model\.layers\.1\.mlp\.experts\.\d+\.(gate|up)_proj\.weight",
            r"model\.embed_tokens\.weight",
        )
    )
    assert found["plan"] == 0
    assert found["export"] < 1.6 * largest
    # The control: the measure sees tensors that are kept.
    assert found["kept"] >= found["weights"] > 4 * largest


def first_logits(checkpoint: Path, source: Any) -> torch.Tensor:
    chunks = built(checkpoint, ONE)
    load_hf_weights(chunks, source)
    with torch.no_grad():
        return chunks[0](torch.arange(12)[None], torch.arange(12)[None], None)[0]


def test_swapped_experts_change_the_logits(checkpoint):
    tensors = tensors_of(checkpoint)
    (logits,) = run_ranks(first_logits, 1, checkpoint, tensors)
    first, second = EXPERT.format(0), EXPERT.format(1)
    swapped = tensors | {first: tensors[second], second: tensors[first]}
    (other,) = run_ranks(first_logits, 1, checkpoint, swapped)
    assert (logits - other).abs().max() > 1e-3


def load_from(checkpoint: Path, layout: ParallelLayout, source: Any) -> None:
    load_hf_weights(built(checkpoint, layout), source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"is missing 1 of the \d+ tensors.*{Q_PROJ}"),
        (lambda t: t.update(extra=t[Q_PROJ]), "has 1 tensors that do not belong.*extra"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].T.contiguous()}),
            rf"{Q_PROJ} has shape \[64, 128\], expected \[128, 64\]",
        ),
        (
            lambda t: t.update({EXPERT.format(3): t[EXPERT.format(3)][:, :-1]}),
            r"experts\.3\.up_proj.* has shape \[32, 63\], expected \[32, 64\]",
        ),
    ],
    ids=["missing", "unexpected", "transposed", "narrow"],
)
def test_load_names_the_tensor_that_does_not_fit(
    checkpoint, change: Callable[[dict[str, torch.Tensor]], Any], message
):
    tensors = tensors_of(checkpoint)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        run_ranks(load_from, 1, checkpoint, ONE, tensors)


@pytest.mark.ranks
def test_load_fails_on_all_ranks_when_one_misses_a_tensor(checkpoint):
    layout, world_size = LAYOUTS["pp2"]
    tensors = tensors_of(checkpoint)
    del tensors["lm_head.weight"]

    def message() -> str:
        try:
            load_from(checkpoint, layout, tensors)
        except CheckpointError as error:
            return str(error)
        return ""

    messages = run_ranks(message, world_size)
    assert all("lm_head.weight" in text for text in messages), messages


@pytest.mark.ranks
def test_tied_embeddings_reach_both_pipeline_ends(tmp_path):
    path = write_tiny_checkpoint(tmp_path, tie_word_embeddings=True, num_hidden_layers=2)
    layout, world_size = LAYOUTS["pp2"]
    assert "lm_head.weight" not in tensors_of(path)
    for exported in run_ranks(round_trip, world_size, path, layout):
        assert_equal_tensors(exported, tensors_of(path))


def test_load_reads_a_sharded_checkpoint(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=2, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    (exported,) = run_ranks(round_trip, 1, path, ONE)
    with SafetensorsCheckpoint(path) as source:
        assert_equal_tensors(exported, dict(source))


def test_a_missing_shard_is_named(tmp_path):
    path = write_tiny_checkpoint(tmp_path, num_hidden_layers=2, max_shard_size="200KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        SafetensorsCheckpoint(path)


def test_a_tensor_that_only_the_index_names_is_an_error(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys("ab", "x.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no file contains: b"):
        SafetensorsCheckpoint(tmp_path)


def test_a_directory_without_weights_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        SafetensorsCheckpoint(tmp_path)


def save(checkpoint: Path, output: Path, layout: ParallelLayout, **options: Any) -> None:
    chunks = built(checkpoint, layout)
    load_hf_weights(chunks, checkpoint)
    save_hf_checkpoint(chunks, checkpoint, output, **options)
    # Visible to every rank when the call returns.
    assert (output / "config.json").is_file(), dist.get_rank()


def hf_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits[0]


@pytest.mark.ranks
def test_saved_checkpoint_reloads_in_transformers(checkpoint, tmp_path):
    layout, world_size = LAYOUTS["ep2"]
    run_ranks(save, world_size, checkpoint, tmp_path / "out", layout)
    assert torch.equal(hf_logits(tmp_path / "out"), hf_logits(checkpoint))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([40, 41]) == "DE"


def test_saved_checkpoint_is_sharded(checkpoint, tmp_path):
    output = tmp_path / "out"
    run_ranks(lambda: save(checkpoint, output, ONE, max_shard_bytes=200_000), 1)
    names = sorted(path.name for path in output.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    with SafetensorsCheckpoint(output) as source:
        assert_equal_tensors(dict(source), tensors_of(checkpoint))


@pytest.mark.ranks
def test_save_refuses_an_existing_directory_on_every_rank(checkpoint, tmp_path):
    layout, world_size = LAYOUTS["ep2"]

    def message() -> str:
        with pytest.raises(CheckpointError) as caught:
            save(checkpoint, tmp_path, layout)
        return str(caught.value)

    messages = run_ranks(message, world_size)
    assert all("exists already" in text for text in messages), messages


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"'unheard_of'.*qwen3_moe"):
        family_of("unheard_of")


@pytest.mark.ranks
@pytest.mark.parametrize(("family", "name"), [("gpt_oss", "ep2"), ("ernie4_5_moe", "pp2_ep2")])
def test_export_of_stacked_experts_and_of_biases_is_bit_equal_in_a_layout(tmp_path, family, name):
    path = write_tiny_checkpoint(tmp_path, family, num_hidden_layers=2)
    layout, world_size = LAYOUTS[name]
    with SafetensorsCheckpoint(path) as source:
        expected = dict(source)
    for exported in run_ranks(round_trip, world_size, path, layout):
        assert_equal_tensors(exported, expected)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_export_is_bit_equal_with_latent_attention_and_expert_biases(tmp_path, name):
    path = write_tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=4)
    layout, world_size = LAYOUTS[name]
    for exported in run_ranks(round_trip, world_size, path, layout):
        assert_equal_tensors(exported, tensors_of(path))


def test_the_expert_bias_stays_in_float32(tmp_path):
    path = write_tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=2, dtype=torch.bfloat16)
    (exported,) = run_ranks(round_trip, 1, path, ONE, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in exported.items()}
    assert dtypes.pop("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_multi_token_prediction_layers_are_kept_as_they_were(tmp_path):
    path = write_tiny_checkpoint(
        tmp_path / "in", "deepseek_v3", num_hidden_layers=2, num_nextn_predict_layers=1
    )
    extra = {f"model.layers.2.{name}.weight": torch.randn(4, 4) for name in ("eh_proj", "enorm")}
    tensors = {n: t for n, t in tensors_of(path).items() if not n.startswith("model.layers.2.")}
    save_file(tensors | extra, path / "model.safetensors", metadata={"format": "pt"})
    run_ranks(save, 1, path, tmp_path / "out", ONE)
    with SafetensorsCheckpoint(tmp_path / "out") as saved:
        assert_equal_tensors(dict(saved), tensors | extra)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_an_export_is_a_full_push_of_a_checkpoint_with_prediction_layers(tmp_path, family):
    """They are not trained, so engines must not wait for them."""
    path = write_tiny_checkpoint(tmp_path, family, num_hidden_layers=2, num_nextn_predict_layers=1)
    trained = {n: t for n, t in tensors_of(path).items() if not n.startswith("model.layers.2.")}
    extra = {
        "model.layers.2.eh_proj.weight": torch.randn(4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(4),
    }
    save_file(trained | extra, path / "model.safetensors", metadata={"format": "pt"})
    facts = read_facts(path)
    (exported,) = run_ranks(round_trip, 1, path, ONE)
    assert_equal_tensors(dict(checked_weights(iter(exported.items()), facts)), trained)
    assert_equal_tensors(dict(checkpoint_tensors(path)), trained)
    del exported["model.norm.weight"]
    with pytest.raises(EngineError, match=r"1 of \d+ weights were not pushed: model\.norm"):
        list(checked_weights(iter(exported.items()), facts))


def test_a_layer_beyond_the_multi_token_prediction_layers_is_unexpected(tmp_path):
    path = write_tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=2)
    tensors = tensors_of(path) | {"model.layers.2.eh_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=r"1 tensors that do not belong .*layers\.2\.eh_proj"):
        run_ranks(load_from, 1, path, ONE, tensors)
