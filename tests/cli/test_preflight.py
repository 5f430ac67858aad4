"""Doctor, dry run and start refuse the same for the same reason, before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
from moe_replay.cli.main import main
from moe_replay.engines.embedded.engine import EmbeddedEngine
from moe_replay.engines.serve.run import tls_options
from moe_replay.errors import EngineError, MoeReplayError
from moe_replay.grpo import loop
from moe_replay.grpo.engines import recipe_engine
from moe_replay.grpo.start import opening, preflight
from moe_replay.recipe.load import load_recipe
from moe_replay.recipe.recipe import ProcessSpec
from moe_replay.report import SilentReporter
from moe_replay.testing.tiny_models import write_tiny_checkpoint

from ..support.served import served
from .conftest import CONFIG

ALONE = ProcessSpec(rank=0, world_size=1, local_rank=0, launched_by_torchrun=False)
WEIGHTS = "model.safetensors"


def config(**changed: Any) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        table = {**json.loads((model / "config.json").read_text()), **changed}
        (model / "config.json").write_text(json.dumps(table))

    return write


def weights(**changed: torch.Tensor | None) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        tensors = load_file(model / WEIGHTS) | {k: v for k, v in changed.items() if v is not None}
        for name in [name for name, tensor in changed.items() if tensor is None]:
            del tensors[name]
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return write


def index(content: object) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / WEIGHTS).unlink()
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return write


def cut(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5000])


def enlarge_tokenizer(model: Path) -> None:
    table = json.loads((model / "tokenizer.json").read_text())
    table["model"]["vocab"]["<x>"] = 500
    (model / "tokenizer.json").write_text(json.dumps(table))


NORM = "model.norm.weight"
CORRUPTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "experts as text": (config(num_experts="8"), "num_experts = '8' (str)"),
    "experts as float": (config(num_experts=8.0), "num_experts = 8.0 (float)"),
    "a billion experts": (config(num_experts=10**9), "num_experts = 1000000000"),
    "many experts": (config(num_experts=60000), "requires 60000 experts a layer"),
    "top-k above experts": (config(num_experts_per_tok=33), "num_experts_per_tok = 33 with 8"),
    "every expert": (config(num_experts_per_tok=8), "replay cannot be exact with moe_router_topk"),
    "theta NaN": (config(rope_parameters={"rope_theta": float("nan")}), "the number NaN"),
    "no model_type": (config(model_type=None), "has model_type None"),
    "foreign code": (
        config(model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        "no weight table for model_type 'evil'",
    ),
    "quantized": (config(quantization_config={"quant_method": "fp8"}), "quantized checkpoint"),
    "vision": (config(text_config={"model_type": "t", "num_experts": 8}), "multimodal model"),
    "sliding window": (config(use_sliding_window=True), "use_sliding_window = True"),
    "attention bias": (config(attention_bias=True), "attention_bias = True"),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "holds neither model.safetensors"),
    "cut weights": (cut, "cannot be read as safetensors"),
    "missing tensor": (weights(**{NORM: None}), "is missing 1 of the"),
    "unknown tensor": (weights(**{"model.x": torch.ones(1)}), "has 1 tensors that do not belong"),
    "other shape": (weights(**{NORM: torch.ones(63)}), "has shape [63], expected [64]"),
    "int8": (weights(**{NORM: torch.ones(64, dtype=torch.int8)}), "as I8: it is quantized"),
    "scales": (weights(**{"a.weight_scale_inv": torch.ones(1)}), "it is quantized"),
    "index outside": (index({"metadata": {}, "weight_map": {"a": "../b"}}), "beside it"),
    "index list": (index([]), "holds a list, expected an object"),
    "large tokenizer": (enlarge_tokenizer, "token ids up to 500, but vocab_size is 100"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer in"),
}


def answers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return what each caller says of a recipe that cannot run."""
    said = {}
    assert main(["doctor", str(recipe), "--json"]) == 2
    said["doctor"] = json.loads(capsys.readouterr().out)["problems"][0]
    for caller, flags in (("dry run", ["--dry-run"]), ("start", [])):
        assert main(["train", str(recipe), *flags]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        said[caller] = " ".join(captured.err.split())
    with pytest.raises(MoeReplayError) as refused:
        loop.train(load_recipe(recipe, []), process=ALONE, reporter=SilentReporter())
    said["library"] = str(refused.value)
    return said


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*_: object, **__: object) -> None:
        raise AssertionError("the start went on to build something")

    monkeypatch.setattr(opening, "initialize", built)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize("name", CORRUPTED)
def test_t19_r11_every_caller_refuses_a_checkpoint_for_the_same_reason(
    write_recipe, capsys, tmp_path, name
):
    corrupt, message = CORRUPTED[name]
    recipe = write_recipe()
    corrupt(tmp_path / "model")
    said = answers(recipe, capsys)
    assert message in said["doctor"]
    assert said["library"] == said["doctor"]
    for caller in ("dry run", "start"):
        assert " ".join(said["doctor"].split()) in said[caller]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"megatron": {"pipeline_model_parallel_size": 3}}, "2 layers cannot be dealt evenly"),
        (
            {"megatron": {"tensor_model_parallel_size": 3}},
            "num_attention_heads = 4 cannot be split",
        ),
        ({"megatron": {"expert_model_parallel_size": 3}}, "num_experts = 8 cannot be split"),
        ({"megatron": {"context_parallel_size": 2, "moe_aux_loss_coeff": 0.0}}, None),
    ],
)
def test_t19_every_caller_refuses_a_layout(write_recipe, capsys, sections, message):
    """Only the doctor accepts a layout that needs more processes than were started."""
    recipe = write_recipe(**sections)
    if message is None:
        assert main(["doctor", str(recipe)]) == 0
        capsys.readouterr()
        message = "1 processes were started, [megatron] needs a multiple of 2"
    else:
        assert main(["doctor", str(recipe), "--json"]) == 2
        problems = json.loads(capsys.readouterr().out)["problems"]
        assert any(message in problem for problem in problems)
    found = preflight.preflight(load_recipe(recipe, []), ALONE)
    assert any(message in str(problem) for problem in found.problems)
    for flags in (["--dry-run"], []):
        assert main(["train", str(recipe), *flags]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_d12_a_query_norm_over_all_heads_is_refused_under_tensor_parallelism(write_recipe, capsys):
    olmoe = {**CONFIG, "model_type": "olmoe", "intermediate_size": 32}
    recipe = write_recipe(config=olmoe, megatron={"tensor_model_parallel_size": 4})
    assert main(["doctor", str(recipe)]) == 2
    assert "query and key norms span all heads" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("package", "sections", "message"),
    [
        ("vllm", {"rollout": {"engine": "vllm"}}, "vllm is missing, expected"),
        ("wandb", {"logging": {"sinks": ["wandb"]}}, "logging.sinks names it: pip install"),
    ],
)
def test_d12_every_caller_refuses_what_is_not_installed(
    write_recipe, capsys, monkeypatch, package, sections, message
):
    installed = preflight.installed
    monkeypatch.setattr(
        preflight, "installed", lambda name: None if name == package else installed(name)
    )
    for said in answers(write_recipe(**sections), capsys).values():
        assert message in said


def test_d12_a_live_gap_without_replay_is_refused(write_recipe, capsys):
    replay = {"router_replay_mode": "disabled", "live_gap_every": 5}
    for command in (["doctor"], ["train", "--dry-run"], ["train"]):
        assert main([*command, str(write_recipe(replay=replay))]) == 2
        assert "replay.live_gap_every" in capsys.readouterr().err
    recipe = load_recipe(write_recipe(replay={**replay, "live_gap_every": 0}), [])
    assert recipe.replay.live_gap_every == 0


@pytest.mark.usefixtures("nothing_is_built")
def test_d8_every_caller_asks_the_servers(write_recipe, capsys):
    recipe = write_recipe(
        rollout={"engine": "vllm-server", "urls": ["http://127.0.0.1:9"], "timeout_s": 1.0}
    )
    said = answers(recipe, capsys)
    for text in said.values():
        assert "127.0.0.1:9" in text
        assert "start the server, or correct rollout.urls" in text
    # Its class is a kind of EngineError, and is named as one.
    assert "moe-replay: the inference engine failed" in said["dry run"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmbeddedEngine]:
    """Return engines of the recipe's checkpoint and of another model."""
    sizes = {
        key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")
    }
    made = {}
    for name, num_experts in (("same", 8), ("other", 16)):
        folder = tmp_path_factory.mktemp(name)
        write_tiny_checkpoint(folder, **{**sizes, "num_experts": num_experts})
        made[name] = EmbeddedEngine(folder, dtype="bfloat16")
    return made


def test_d8_a_server_of_another_model_is_refused_and_of_the_same_accepted(
    write_recipe, capsys, engines
):
    for name, code in (("same", 0), ("other", 2)):
        with served(engines[name]) as url:
            recipe = write_recipe(rollout={"engine": "vllm-server", "urls": [url]})
            for command in (["doctor"], ["train", "--dry-run"]):
                assert main([*command, str(recipe)]) == code
                printed = " ".join("".join(capsys.readouterr()).split())
                assert ("serves a model with (MoE layers, experts, top-k)" in printed) == bool(code)


def test_a_server_of_a_private_authority_is_accepted_with_its_certificate_and_only_then(
    write_recipe, capsys, engines, authority
):
    cases = {
        str(authority.ca): (0, ""),
        str(authority.other): (2, f"not signed by one in {authority.other} (rollout.ca_file)"),
        None: (2, "in rollout.ca_file"),
        str(authority.key): (2, f"{authority.key} holds a private key and no certificate"),
    }
    web = tls_options(authority.certificate, authority.key, None)
    with served(engines["same"], web=web) as url:
        server = {"engine": "vllm-server", "urls": [url.replace("http://", "https://")]}
        for ca_file, (code, why) in cases.items():
            recipe = write_recipe(rollout=server | ({"ca_file": ca_file} if ca_file else {}))
            for command in (["doctor"], ["train", "--dry-run"]):
                assert main([*command, str(recipe)]) == code
                assert why in " ".join("".join(capsys.readouterr()).split())


def test_d8_a_push_is_tried_at_the_start_and_a_server_that_takes_none_is_named(
    write_recipe, engines, monkeypatch
):
    engine = engines["same"]
    with served(engine) as url:
        recipe = load_recipe(write_recipe(rollout={"engine": "vllm-server", "urls": [url]}), [])
        recipe_engine(recipe, torch.device("cpu")).close()
        # The recipe's checkpoint holds zeros.
        assert not any(parameter.any() for parameter in engine._model.parameters())

        def refuse(*_: object, **__: object) -> None:
            raise EngineError("no room")

        monkeypatch.setattr(engine, "load_weights", refuse)
        with pytest.raises(EngineError, match=r"no room|did not take the weights"):
            recipe_engine(recipe, torch.device("cpu"))


def test_d8_doctor_and_a_dry_run_try_a_push_unless_another_run_may_be_at_work(
    write_recipe, engines, capsys
):
    """One of two servers takes no push."""
    refused = []

    def refuse(*_: object, **__: object) -> None:
        refused.append(True)
        raise EngineError("no room")

    takes, refuses = engines["same"], Refusing(engines["same"], refuse)
    with served(takes) as first, served(refuses) as second:
        recipe = write_recipe(rollout={"engine": "vllm-server", "urls": [first, second]})
        for number, command in enumerate((["doctor"], ["train", "--dry-run"]), start=1):
            assert main([*command, str(recipe)]) == 2
            printed = " ".join("".join(capsys.readouterr()).split())
            assert "only 1 of 2 servers took policy version 0 at the start" in printed
            assert "no room" in printed and len(refused) == number
    with served(takes) as url:
        recipe = write_recipe(rollout={"engine": "vllm-server", "urls": [url]})
        loaded = load_recipe(recipe, [])
        recipe_engine(loaded, torch.device("cpu")).close()
        version = takes.policy_version
        assert main(["train", "--dry-run", str(recipe)]) == 0
        printed = " ".join("".join(capsys.readouterr()).split())
        assert "holds weights of run" in printed and "no push was tried" in printed
        assert takes.policy_version == version


class Refusing:
    """An engine that refuses every push, by `load_weights`."""

    def __init__(self, engine: EmbeddedEngine, load_weights: Any) -> None:
        self._engine, self.load_weights = engine, load_weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
