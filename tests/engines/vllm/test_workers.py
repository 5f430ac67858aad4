"""What a worker answers: never an exception, each tensor once, no load after a torn reload."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_replay.engines.vllm.workers import PushWorker, answered
from moe_replay.errors import DivergedError

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]


class Worker(PushWorker):
    """What the extension needs of vLLM's worker, of which only the failures matter here."""

    def __init__(self, rank: int, *, breaks: bool = False, sticks: bool = False) -> None:
        self.rank, self.breaks, self.sticks = rank, breaks, sticks
        self.loaded: list[str] = []
        self.num_finished = 0

    def reload_weights(self, *, weights_iterator) -> None:
        for name, _ in weights_iterator:
            self.loaded.append(name)
            if self.breaks:
                raise KeyError("planted")

    @property
    def vllm_config(self):
        from vllm.config import VllmConfig

        return VllmConfig()

    @property
    def model_runner(self):
        if self.sticks:
            raise RuntimeError("stuck")
        return self

    @property
    def model_config(self):
        return None

    def get_model(self) -> torch.nn.Module:
        self.num_finished += 1
        return torch.nn.Module()

    @answered
    def fail(self, error: Exception) -> None:
        raise error


def push(folder: Path, **changes: torch.Tensor) -> str:
    tensors = {f"weight{n}": torch.full((3,), float(n)) for n in range(7)} | changes
    save_file(
        {n: t for n, t in tensors.items() if n < "weight4"}, folder / "model-00000.safetensors"
    )
    save_file(
        {n: t for n, t in tensors.items() if n >= "weight4"}, folder / "model-00001.safetensors"
    )
    return str(folder)


def test_e24_an_exception_is_an_answer_that_names_the_rank_and_the_class():
    answer = Worker(3).fail(DivergedError("NaN"))
    assert answer == {
        "ok": False,
        "kind": "DivergedError",
        "error": "worker 3: DivergedError: NaN",
        "value": None,
    }


def test_what_ends_a_process_is_no_answer():
    with pytest.raises(SystemExit):
        Worker(0).fail(SystemExit())  # pyrefly: ignore


def test_each_tensor_is_checked_by_one_worker_of_all_replicas(tmp_path):
    folder = push(tmp_path)
    counts = [
        Worker(rank).replay_stage(folder, first, 4)["value"] for first in (0, 2) for rank in (0, 1)
    ]
    assert counts == [2, 2, 2, 1]


def test_e23_only_the_worker_whose_share_it_is_finds_the_value(tmp_path):
    folder = push(tmp_path, weight5=torch.tensor([1.0, float("nan"), 1.0]))
    answers = [Worker(rank).replay_stage(folder, 0, 4) for rank in range(4)]
    assert [answer["ok"] for answer in answers] == [True, False, True, True]
    assert answers[1]["kind"] == "DivergedError"
    assert "weight5" in answers[1]["error"]


def test_e24_an_unpatched_vllm_is_refused_before_a_push(tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.reload import layerwise

    folder = push(tmp_path)
    monkeypatch.setattr(
        layerwise,
        "finalize_layerwise_processing",
        layerwise.finalize_layerwise_processing.__wrapped__,
    )
    answer = Worker(0).replay_stage(folder, 0, 1)
    assert answer["kind"] == "UnsupportedError"


def test_a_push_is_loaded_whole_file_by_file(tmp_path):
    worker = Worker(0)
    assert worker.replay_apply(push(tmp_path))["ok"]
    assert worker.loaded == [f"weight{n}" for n in range(7)]
    assert worker.num_finished == 0


def test_e24_a_reload_that_breaks_off_is_finished(tmp_path):
    worker = Worker(1, breaks=True)
    answer = worker.replay_apply(push(tmp_path))
    assert (answer["kind"], worker.num_finished) == ("KeyError", 1)
    worker.breaks = False
    assert worker.replay_apply(str(tmp_path))["ok"]


def test_e24_a_reload_that_cannot_be_finished_ends_all_pushes(tmp_path):
    worker = Worker(1, breaks=True, sticks=True)
    answer = worker.replay_apply(push(tmp_path))
    assert not answer["ok"]
    assert "stuck" in answer["error"]
    worker.breaks = worker.sticks = False
    for later in (worker.replay_apply(str(tmp_path)), worker.replay_stage(str(tmp_path), 0, 1)):
        assert "can load no weights any more" in later["error"]


def test_e25_a_worker_says_its_own_process():
    # Only its answer is looked at here: the server is this very process, which lives on.
    assert Worker(0).replay_begin(os.getpid())["value"] == os.getpid()


def test_e25_the_end_of_another_process_is_seen():
    from moe_replay.engines.vllm.workers import _wait_for_end

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        thread = threading.Thread(target=_wait_for_end, args=(other.pid,))
        thread.start()
        # Control: it waits while the other lives.
        thread.join(0.1)
        assert thread.is_alive()
        other.stdin.close()
        # Nobody has collected its exit status yet.
        thread.join(300)
        assert not thread.is_alive()


def test_a_slow_reader_loses_no_routes():
    """vLLM joins outputs not read yet; joined pieces (DELTA) lose the routes of the last."""
    import numpy as np
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    def read_late(kind, tokens_of_each):
        collector = RequestOutputCollector(kind, "1")
        for tokens, rows in zip(tokens_of_each, (None, np.zeros((4, 1, 1))), strict=True):
            sampled = CompletionOutput(
                index=0,
                text="",
                token_ids=tokens,
                routed_experts=rows,
                cumulative_logprob=None,
                logprobs=None,
            )
            collector.put(RequestOutput("1", None, [3], None, [sampled], finished=rows is not None))
        return collector.get_nowait().outputs[0]

    last = read_late(RequestOutputKind.CUMULATIVE, ([7], [7, 8]))
    assert (last.token_ids, last.routed_experts is None) == ([7, 8], False)
    piece = read_late(RequestOutputKind.DELTA, ([7], [8]))
    assert (piece.token_ids, piece.routed_experts is None) == ([7, 8], True)
