"""Without CUDA Megatron runs on stand-ins, and nothing outside Megatron notices them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moe_replay.errors import UnsupportedError
from moe_replay.megatron.layout import ParallelLayout, initialize
from moe_replay.megatron.upstream import no_cuda as cpu
from moe_replay.megatron.upstream import uneven
from moe_replay.megatron.upstream.version import check_installed, check_version
from moe_replay.megatron.upstream.warnings import quiet_megatron
from moe_replay.testing.ranks import run_ranks
from moe_replay.testing.tiny_models import write_tiny_checkpoint

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA needs no stand-ins")

SUM_OF_LOGITS = """
import sys
{imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(float(model(torch.arange(9)[None]).logits.detach().double().sum()))
"""
ORDERS = {
    "transformers alone": "import torch, transformers",
    "transformers first": "import torch, transformers, moe_replay.megatron",
    "megatron.core before us": "import megatron.core.models.gpt, moe_replay.megatron, torch, transformers",
}


@pytest.mark.slow
@without_cuda
def test_from_pretrained_is_the_same_in_every_import_order(tmp_path):
    path = str(write_tiny_checkpoint(tmp_path, num_hidden_layers=1))
    running = {
        order: subprocess.Popen(
            [sys.executable, "-c", SUM_OF_LOGITS.format(imports=imports), path],
            stdout=subprocess.PIPE,
            text=True,
        )
        for order, imports in ORDERS.items()
    }
    logits = {order: process.communicate()[0] for order, process in running.items()}
    assert float(logits["transformers alone"])
    assert len(set(logits.values())) == 1, logits


@without_cuda
def test_install_twice_changes_nothing_more():
    before = (torch.Tensor.cuda, torch.Tensor.type, torch.cuda.Stream, dict(vars(dist)))
    cpu.install()
    assert (torch.Tensor.cuda, torch.Tensor.type, torch.cuda.Stream, dict(vars(dist))) == before


@without_cuda
def test_install_leaves_torch_factories_and_compile_alone():
    assert torch.tensor.__module__ is None or torch.tensor.__module__.startswith("torch")
    assert torch.compile.__module__ == "torch"
    with torch.device("meta"):
        assert torch.zeros(2).is_meta


@without_cuda
def test_megatron_is_not_compiled():
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")


@without_cuda
def test_callers_outside_megatron_get_honest_tensor_types():
    assert torch.zeros(1).type() == "torch.FloatTensor"


@without_cuda
def test_callers_outside_megatron_cannot_move_to_cuda():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


@without_cuda
def test_megatron_sees_cuda_tensor_types():
    # Run under the name of a Megatron module, as the optimizer's own check is.
    scope = {"__name__": "megatron.core.optimizer.optimizer", "x": torch.zeros(1)}
    assert eval("(x.type(), x.cuda() is x)", scope) == ("torch.cuda.FloatTensor", True)


def forked_draws() -> tuple[float, float, float]:
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(1)
    before = float(torch.rand(1))
    with get_cuda_rng_tracker().fork():
        inside = float(torch.rand(1))
    after = float(torch.rand(1))
    torch.manual_seed(1)
    expected = (float(torch.rand(1)), float(torch.rand(1)))
    assert (before, after) == expected
    return before, inside, after


@without_cuda
def test_rng_tracker_forks_the_cpu_generator():
    def draws() -> tuple[float, float, float]:
        initialize(ParallelLayout())
        return forked_draws()

    ((before, inside, after),) = run_ranks(draws, 1)
    assert len({before, inside, after}) == 3


def gathered(sizes: list[int]) -> list[list[float]]:
    rank = dist.get_rank()
    outputs = [torch.full((size, 2), -1.0) for size in sizes]
    mine = torch.arange(sizes[rank] * 2).view(-1, 2) + 100.0 * rank
    uneven.all_gather(outputs, mine)
    return [output[:, 0].tolist() for output in outputs]


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [2, 2]])
def test_all_gather_of_uneven_tensors_keeps_each_ranks_rows(sizes):
    expected = [[100.0 * rank + 2 * i for i in range(n)] for rank, n in enumerate(sizes)]
    assert run_ranks(gathered, 2, sizes) == [expected, expected]


def scattered(sizes: list[int]) -> list[float]:
    rank = dist.get_rank()
    inputs = [torch.arange(size, dtype=torch.float32) + 10 * (rank + 1) for size in sizes]
    output = torch.empty(sizes[rank])
    with quiet_megatron():
        uneven.reduce_scatter(output, inputs)
    return output.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [[3, 1], [0, 2], [2, 2]])
def test_reduce_scatter_of_uneven_tensors_sums_each_ranks_rows(sizes):
    # Rank 0 adds 10 + i, rank 1 adds 20 + i.
    expected = [[30.0 + 2 * i for i in range(n)] for n in sizes]
    assert run_ranks(scattered, 2, sizes) == expected


def gloo_gathers_uneven() -> bool:
    outputs = [torch.zeros(3), torch.zeros(1)]
    try:
        dist.all_gather(outputs, torch.full((3 if dist.get_rank() == 0 else 1,), 1.0))
    except (RuntimeError, ValueError):
        return False
    return [float(t.sum()) for t in outputs] == [3.0, 1.0]


@pytest.mark.ranks
def test_gloo_alone_cannot_gather_uneven_tensors():
    assert run_ranks(gloo_gathers_uneven, 2) == [False, False]


def test_installed_megatron_is_in_range():
    assert (0, 16) <= check_installed() < (0, 20)


@pytest.mark.parametrize(
    ("version", "cause"),
    [((0, 15), "no router replay"), ((0, 20), "never verified"), ((1, 0), "never verified")],
)
def test_versions_out_of_range_are_refused(version, cause):
    with pytest.raises(UnsupportedError, match=cause):
        check_version(version)


def test_quiet_megatron_lets_other_warnings_through():
    with pytest.warns(UserWarning, match="something else"), quiet_megatron():
        warnings.warn("something else", UserWarning, stacklevel=1)
