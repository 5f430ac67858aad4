"""Which process this is, and what torch finds when it loads."""

import pytest

from moe_replay.cli.environment import read_process, set_defaults
from moe_replay.errors import RecipeError
from moe_replay.recipe.recipe import ProcessSpec

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_process_without_torchrun_is_alone():
    assert read_process({}) == ProcessSpec(
        rank=0, world_size=1, local_rank=0, launched_by_torchrun=False
    )


def test_process_under_torchrun_has_its_rank():
    assert read_process(TORCHRUN) == ProcessSpec(
        rank=3, world_size=4, local_rank=1, launched_by_torchrun=True
    )


def test_half_of_a_torchrun_environment_is_refused():
    with pytest.raises(RecipeError, match="sets RANK, but not WORLD_SIZE, LOCAL_RANK"):
        read_process({"RANK": "0"})


def test_rank_that_is_no_number_is_refused():
    with pytest.raises(RecipeError, match=r"must be numbers.*'three'"):
        read_process({**TORCHRUN, "RANK": "three"})


def test_defaults_are_set_before_torch_loads():
    environ = {"CUDA_VISIBLE_DEVICES": ""}
    set_defaults(environ)
    assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environ["TORCHDYNAMO_DISABLE"] == "1"
    assert int(environ["OMP_NUM_THREADS"]) >= 1


def test_defaults_leave_the_users_choice():
    environ = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}
    set_defaults(environ)
    assert environ["OMP_NUM_THREADS"] == "7"
    assert environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_processes_of_one_machine_share_its_cores():
    environ = {"LOCAL_WORLD_SIZE": "100000"}
    set_defaults(environ)
    assert environ["OMP_NUM_THREADS"] == "1"


def test_workers_of_a_server_share_its_cores_and_are_bound_to_none(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    environ = {"CUDA_VISIBLE_DEVICES": ""}
    set_defaults(environ, num_workers=4)
    assert environ["OMP_NUM_THREADS"] == "2"
    # vLLM would bind the workers of each replica to the same cores.
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
