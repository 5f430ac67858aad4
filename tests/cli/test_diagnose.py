"""`moe-replay diagnose` on the demo model, on saved routes, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from moe_replay.cli.main import main
from moe_replay.testing.ranks import run_ranks

MODEL = Path(__file__).parents[2] / "recipes" / "demo" / "model"
TASK = ("min_terms=5", "max_terms=5", "min_digits=1", "max_digits=1")
PROMPTS = ("--prompts", "reasoning_gym:chain_sum", "--task", *TASK)
SAMPLES = ("--num-samples", "16", "--max-prompt-length", "24", "--max-completion-length", "16")


def diagnosed(*arguments: object) -> int:
    return main(["diagnose", *map(str, arguments)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """Run the command once: the embedded engine in bfloat16 beside Megatron in float32."""
    folder = tmp_path_factory.mktemp("diagnose")

    def command() -> str:
        import contextlib
        import io

        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            keep = ("--keep", folder / "rollout", "--json", folder / "found.json")
            assert diagnosed(MODEL, "--engine", "embedded", *PROMPTS, *SAMPLES, *keep) == 0
        return shown.getvalue()

    (shown,) = run_ranks(command, 1)
    return folder, json.loads((folder / "found.json").read_text()), shown


@pytest.mark.ranks
def test_the_demo_has_a_gap_of_routing_and_precision_and_no_misalignment(demo):
    _, found, _ = demo
    assert found["conclusion"]["cause"] in ("routing", "precision")
    assert found["conclusion"]["causes"] == []
    assert found["num_sequences"] == 16
    assert found["coverage"] == 1
    live, replayed = found["live"], found["replayed"]
    assert replayed["k3"]["value"] < live["k3"]["value"] < 0.02
    # k3 is the same divergence over sampled tokens alone.
    assert 0.2 < live["kl"]["value"] / live["k3"]["value"] < 5
    assert replayed["kl"]["value"] < live["kl"]["value"]
    assert found["engine_again"]["value"] < live["k3"]["value"]
    assert 0 < found["flips"]["flip_frac"] < 0.2
    assert found["margins"]["median_flipped"] < found["margins"]["median_kept"] / 2


@pytest.mark.ranks
def test_the_screen_has_80_columns_the_verdict_and_no_escape_codes(demo):
    _, found, shown = demo
    assert f"Verdict: {found['conclusion']['cause']}" in shown
    assert "Routes: " in shown
    assert "k3" in shown
    # Which tokens a column is about.
    live, replayed = found["live"]["num_tokens"], found["replayed"]["num_tokens"]
    assert ["tokens", str(live), str(replayed)] in [line.split() for line in shown.splitlines()]
    assert "3/n" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.ranks
def test_a_kept_rollout_and_its_routes_alone_are_diagnosed_without_an_engine(demo, capsys):
    folder, before, _ = demo
    ours = ("--trainer", "transformers", "--dtype", "float32", "--json", "-")
    assert diagnosed(MODEL, "--rollouts", folder / "rollout", *ours) == 0
    found = json.loads(capsys.readouterr().out)
    # transformers and Megatron are the same model in float32.
    assert found["live"]["k3"]["value"] == pytest.approx(before["live"]["k3"]["value"], rel=1e-2)
    assert found["flips"]["flip_frac"] == pytest.approx(before["flips"]["flip_frac"], abs=2e-3)
    (traces,) = (folder / "rollout").glob("*.traces")
    alone = folder / "alone.traces"
    alone.write_bytes(traces.read_bytes())
    assert diagnosed(MODEL, "--rollouts", alone, *ours) == 0
    routes = json.loads(capsys.readouterr().out)
    assert routes["flips"]["flip_frac"] == found["flips"]["flip_frac"]
    assert (routes["live"], routes["conclusion"]["cause"]) == (None, "unknown")
    # A rollout names the weights that sampled it, its traces alone do not.
    assert found["conclusion"]["limits"] == []
    assert "does not name the weights" in routes["conclusion"]["limits"][0]


@pytest.mark.ranks
def test_a_rollout_that_names_no_weights_limits_the_verdict(demo, tmp_path, capsys):
    """What a checkpoint holds of a step sampled ahead: after pushes, without a digest."""
    folder = demo[0]
    copy = shutil.copytree(folder / "rollout", tmp_path / "rollout")
    (manifest,) = copy.glob("*.json")
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(text | {"weights": {}, "policy_version": 3}))
    ours = ("--trainer", "transformers", "--dtype", "float32", "--json", "-")
    assert diagnosed(MODEL, "--rollouts", copy, *ours) == 0
    found = json.loads(capsys.readouterr().out)
    (limit,) = found["conclusion"]["limits"]
    assert "does not name the weights that sampled it (after 3 pushes" in limit
    assert "whether engine and trainer hold the same is not known" in limit


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert diagnosed(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_diagnosed_is_refused(capsys, tmp_path):
    assert "give either --engine" in refusal(capsys, MODEL)
    assert "--engine needs --prompts" in refusal(capsys, MODEL, "--engine", "embedded")
    both = ("--rollouts", tmp_path, "--keep", tmp_path)
    assert "--keep has no effect" in refusal(capsys, MODEL, *both)
    sampling = ("--temperature", "0.7", "--engine-dtype", "float32")
    said = refusal(capsys, MODEL, "--rollouts", tmp_path, *sampling, "--task", "a=1")
    assert "--temperature and --engine-dtype and --task has no effect with --rollouts" in said
    # A value that is the default is as much without effect.
    default = ("--rollouts", tmp_path, "--num-samples", "64")
    assert "--num-samples has no effect" in refusal(capsys, MODEL, *default)
    token = ("--engine", "embedded", *PROMPTS, "--token-file", tmp_path / "token")
    assert "--token-file has no effect with --engine embedded" in refusal(capsys, MODEL, *token)
    twin = ("--twin", MODEL, "--trainer", "transformers")
    server = ("--engine", "http://127.0.0.1:1", *twin)
    assert "servers hold one" in refusal(capsys, MODEL, *server, *PROMPTS)
    engine = ("--engine", "embedded", *PROMPTS)
    assert "give a dense one" in refusal(capsys, MODEL, *engine, *twin)
    assert "needs --trainer transformers" in refusal(capsys, MODEL, *engine, "--twin", MODEL)
    assert "expected a multiple" in refusal(capsys, MODEL, *engine, "--num-samples", "30")
    assert "embedded" in refusal(capsys, MODEL, "--engine", "embeded", *PROMPTS)


@pytest.mark.vllm
@pytest.mark.ranks
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_on_the_demo_model_gives_routes_and_no_exact_kl(tmp_path):
    def command() -> None:
        arguments = (
            MODEL,
            "--engine",
            "vllm",
            *PROMPTS,
            *SAMPLES,
            "--json",
            tmp_path / "found.json",
        )
        assert diagnosed(*arguments) == 0

    run_ranks(command, 1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["conclusion"]["cause"] in ("routing", "precision")
    assert found["coverage"] == 1
    assert found["live"]["kl"] is None
    assert "vllm" in found["setting"]["no_kl"]
