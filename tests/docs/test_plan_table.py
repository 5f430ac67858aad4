"""The tables of docs/plan.md are what the formulas say today."""

import importlib.util
from pathlib import Path

import pytest

import moe_replay.megatron  # noqa: F401 - silences Megatron-Core's own imports

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "plan_table", ROOT / "benchmarks" / "plan_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_page(name: str) -> list[str]:
    text = (ROOT / "docs" / "plan.md").read_text()
    table = text.partition(f"<!-- plan-{name}: begin -->\n")[2]
    return table.partition(f"<!-- plan-{name}: end -->")[0].splitlines()


@pytest.mark.parametrize("name", ["models", "published"])
def test_tables_are_up_to_date(script, name):
    table = {"models": script.table, "published": script.published}[name]
    assert of_page(name) == list(table())
