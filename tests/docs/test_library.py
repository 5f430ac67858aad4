"""The examples of the library page run, in their order, as a reader would paste them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCK = re.compile(
    r"(?:<!-- run with: (?P<needs>[^>]+) -->\n)?```python\n(?P<code>.*?)```\n", re.DOTALL
)


def blocks(text: str, needs: str | None) -> list[tuple[int, str]]:
    """Return (line, code) of the examples that need just that."""
    return [
        (text[: match.start("code")].count("\n"), match["code"])
        for match in BLOCK.finditer(text)
        if match["needs"] == needs
    ]


def run(text: str, needs: str | None, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run the examples in one namespace; a failing line has its number on the page."""
    found = blocks(text, needs)
    assert found, f"the page has no example for {needs}"
    for line, code in found:
        exec(compile("\n" * line + code, PAGE.name, "exec"), namespace)
    return namespace


def test_examples_of_the_core_run():
    names = run(PAGE.read_text(), None, {})
    assert {"rollout", "received", "stage", "weights", "agreement", "found"} <= names.keys()


def test_example_for_hugging_face_runs(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    model = AutoModelForCausalLM.from_pretrained(write_tiny_checkpoint(tmp_path))
    names = {"hf_model": model, "token_ids": torch.arange(5, 17)[None], "np": np}
    assert run(PAGE.read_text(), "a model of Hugging Face", names)["recorded"].shape == (12, 4, 4)


def test_examples_of_the_hugging_face_page_run(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    text = (PAGE.parent / "transformers.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(write_tiny_checkpoint(tmp_path))
    names = {"hf_model": model, "token_ids": torch.arange(5, 17)[None]}
    assert run(text, "a model of Hugging Face", names)["routes"].shape == (12, 4, 4)
    assert "ArgsortRouter" in run(text, None, {})


def megatron_example(checkpoint: Path) -> tuple[bool, bool]:
    """Return whether replay changed the logits, and whether they are finite."""
    import torch

    from moe_replay.megatron.scorer import packed_rows
    from moe_replay.testing.policies import start_policy
    from moe_replay.testing.synthetic_routes import synthetic_trace

    chunks = start_policy(checkpoint).chunks
    tokens = np.arange(5, 17)

    def forward(chunk):
        return chunk(
            torch.from_numpy(tokens)[None],
            torch.arange(len(tokens))[None],
            None,
            packed_seq_params=packed_rows([len(tokens)]),
        )

    with torch.no_grad():
        live = forward(chunks[0])
    names = {
        "chunks": chunks,
        "traces": [synthetic_trace(tokens, seed=1, num_layers=4)],
        "forward": forward,
    }
    replayed = run(PAGE.read_text(), "a model of Megatron-Core", names)["replayed"]
    return bool((live - replayed).abs().max() > 1e-3), bool(replayed.isfinite().all())


@pytest.mark.ranks
def test_example_for_megatron_runs(tmp_path):
    import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports
    from moe_replay.testing.ranks import run_ranks
    from moe_replay.testing.tiny_models import write_tiny_checkpoint

    assert run_ranks(megatron_example, 1, write_tiny_checkpoint(tmp_path))[0] == (True, True)


def test_every_example_of_the_page_is_run():
    text = PAGE.read_text()
    needs = (None, "a model of Hugging Face", "a model of Megatron-Core")
    assert sum(len(blocks(text, need)) for need in needs) == text.count("```") // 2


@pytest.mark.parametrize("code", ["assert 1 == 2", "import moe_replay.nowhere"])
def test_run_sees_an_example_that_fails(code):
    with pytest.raises((AssertionError, ImportError)) as failure:
        run(f"text\n\n```python\n{code}\n```\n", None, {})
    assert failure.traceback[-1].lineno == 3  # the fourth line of the page, counted from 0


def test_examples_of_the_alignment_page_run():
    names = run((PAGE.parent / "alignment.md").read_text(), None, {})
    assert {"packed", "rectangle", "rank0", "contiguous", "shard", "routes", "ids"} <= names.keys()
