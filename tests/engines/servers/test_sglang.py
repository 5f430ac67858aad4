"""SGLang behind the server engine: what is asked at the start, pushes, faults, retractions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_replay.engines.serve.messages import PolicyName
from moe_replay.engines.servers.engine import ServerEngine
from moe_replay.engines.servers.faults import Fault
from moe_replay.engines.servers.sglang import SglangCalls
from moe_replay.errors import EngineError, RecipeError, UnsupportedError

from ...support.faults import Faulty
from ...support.rounds import asking_all
from ...support.served import listening, served
from ...support.sglang_like import SglangLike
from ..server_case import FACTS, SAMPLING, client, fake, requests, tokens, weights

pytestmark = pytest.mark.vllm


def server(**options: Any) -> Any:
    return listening(SglangLike(fake(), num_decoder_layers=2, **options).application())


def sglang(*urls: str, folder: Path | None = None, **options: Any) -> ServerEngine:
    return client(*urls, connect=partial(SglangCalls, facts=FACTS), weights_dir=folder, **options)


def test_log_probabilities_that_ignore_the_temperature_are_refused_before_the_first_step():
    with (
        server(original_logprobs=True) as url,
        pytest.raises(RecipeError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"),
    ):
        sglang(url)


def test_a_server_of_another_model_is_refused_before_the_first_step():
    application = SglangLike(fake(), num_decoder_layers=5).application()
    with listening(application) as url, pytest.raises(RecipeError, match="another model"):
        sglang(url)


def test_a_server_of_another_number_format_is_refused():
    with (
        server(options={"dtype": "auto"}) as url,
        pytest.raises(RecipeError, match=r"samples in auto.*--dtype float32"),
    ):
        sglang(url)


def test_a_server_that_restores_rows_from_host_memory_is_refused():
    with (
        server(options={"enable_hierarchical_cache": True}) as url,
        pytest.raises(UnsupportedError, match="26975"),
    ):
        sglang(url)


def test_a_server_of_another_kind_is_refused():
    with served(fake()) as url, pytest.raises(RecipeError, match=r"sglang\.launch_server"):
        sglang(url)


def test_a_push_reaches_every_server_through_one_set_of_files(tmp_path):
    with server() as first, server() as second:
        engine = sglang(first, second, folder=tmp_path)
        before = tokens(engine.generate(requests(), SAMPLING))
        engine.load_weights(weights(), policy_version=1)
        held = [each.status().policy for each in engine._servers]
        groups = engine.generate(requests(), SAMPLING)
        engine.close()
    assert held == [PolicyName(run="test", policy_version=1)] * 2
    assert tokens(groups) != before
    assert {c.policy_version for g in groups for c in g.completions} == {1}
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_missed_a_push_is_counted_as_stale_and_left_alone(tmp_path):
    with server() as first, server() as second:
        both = asking_all(sglang(first, second, folder=tmp_path, calls_per_server=1))
        one = sglang(first, folder=tmp_path)
        one.load_weights(weights(), policy_version=1)
        both._run, both._policy_version = one._run, one.policy_version
        groups = both.generate(requests(12), SAMPLING)
        assert {c.policy_version for g in groups for c in g.completions} == {1}
        assert both.faults[Fault.STALE] >= 1
        both.close(), one.close()


def test_a_push_that_the_server_refuses_stops_the_run_and_leaves_no_file(tmp_path):
    class Full(SglangLike):
        def _update(self, call: dict[str, Any]) -> Any:
            return super()._update({**call, "model_path": str(tmp_path / "gone")})

    with listening(Full(fake(), num_decoder_layers=2).application()) as url:
        engine = sglang(url, folder=tmp_path)
        with pytest.raises(EngineError, match="Cannot find any model weights"):
            engine.load_weights(weights(), policy_version=1)
        assert engine.policy_version == 0 and list(tmp_path.rglob("*.safetensors")) == []
        engine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_push_needs_a_folder_that_exists(tmp_path):
    with server() as url:
        engine = sglang(url, folder=tmp_path / "gone")
        with pytest.raises(EngineError, match=r"rollout\.weights_dir"):
            engine.load_weights(weights(), policy_version=1)
        engine.close()


def test_the_token_opens_the_server():
    with server(token="secret") as url:
        with pytest.raises(RecipeError, match="bearer token"):
            sglang(url)
        engine = sglang(url, token="secret")
        assert engine.generate(requests(), SAMPLING)
        engine.close()


def test_faults_are_survived():
    # Flipped bits are left out: SGLang's JSON has no checksum, so a changed digit goes unnoticed.
    kinds = ("die", "fail", "cut")
    application = SglangLike(fake(), num_decoder_layers=2).application()
    faulty = Faulty(application, kinds, share=0.0, seed=5)
    with listening(faulty) as url:
        engine = sglang(url, max_attempts=40, calls_per_server=1)
        expected = tokens(engine.generate(requests(16), SAMPLING))
        faulty._share = 0.2
        assert tokens(engine.generate(requests(16), SAMPLING)) == expected
        assert sum(faulty.made.values()) >= 3
        assert sum(engine.faults.values()) == sum(faulty.made.values())
        engine.close()
