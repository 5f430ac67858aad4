"""What one has to touch for a key and for an engine, shown on a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_replay

from ..grpo.smallest_recipe import table

SECTION = '''class ParrotEngineSection(RolloutSection):
    """Says what it was taught."""

    engine: Literal["parrot"]
    phrase: str
    """What it says."""


'''
ENTRY = '''"""How a recipe opens the parrot."""

from moe_replay.engines.registry import EngineUse
from moe_replay.recipe.sections.rollout import ParrotEngineSection


def open_engine(section: ParrotEngineSection, use: EngineUse, **_: object) -> str:
    return f"{section.phrase}, with routes: {use.record_routes}"


def check_engine(section: ParrotEngineSection, use: EngineUse, *_: object, **__: object):
    return [f"it will say {section.phrase}"]
'''
PROGRAM = """
from pathlib import Path
from moe_replay.engines.registry import EngineUse, engine_entry
from moe_replay.errors import RecipeError
from moe_replay.recipe.keys import recipe_keys
from moe_replay.recipe.load import recipe_from_table

class OneRank:
    size, rank = 1, 0
    def gather(self, value):
        return [value]

table = TABLE
recipe = recipe_from_table(table)
use = EngineUse(model_dir=Path("m"), max_context_length=8, record_routes=True)
entry = engine_entry(recipe.rollout)
print(entry.open_engine(recipe.rollout, use, device="cpu", ranks=OneRank()))
print(entry.check_engine(recipe.rollout, use, None, num_ranks=1))
keys = {key.path: key for key in recipe_keys()}
print(keys["rollout.phrase"].default, keys["rollout.engine"].choices)
table["rollout"]["engine"] = "embedded"
try:
    recipe_from_table(table)
except RecipeError as error:
    print(error)
"""
KEY = '''    momentum: float = 0.0
    """Scratch."""
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    target = tmp_path / "src" / "moe_replay"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(moe_replay.__file__).parent, target, ignore=ignored)
    return target


def insert(path: Path, before: str, text: str) -> None:
    source = path.read_text()
    assert source.count(before) == 1, f"{path} changed: correct this test"
    path.write_text(source.replace(before, text + before))


def run(package: Path, program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_engine_is_a_folder_a_section_and_a_line(package):
    program = PROGRAM.replace("TABLE", repr(table(rollout={"engine": "parrot", "phrase": "hi"})))
    # The control: nothing knows it yet.
    with pytest.raises(AssertionError, match="expected 'embedded', 'vllm'"):
        run(package, program)
    folder = package / "engines" / "parrot"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "entry.py").write_text(ENTRY)
    sections = package / "recipe" / "sections" / "rollout.py"
    insert(sections, "def _by_name(", SECTION)
    insert(sections, "    EmbeddedEngineSection,\n", "    ParrotEngineSection,\n")
    registry = package / "engines" / "registry.py"
    line = '    rollout.ParrotEngineSection: "parrot",\n'
    insert(registry, '    rollout.EmbeddedEngineSection: "embedded",\n', line)
    output = run(package, program)
    assert "hi, with routes: True" in output
    assert "['it will say hi']" in output
    assert "required ('parrot', 'embedded', 'vllm'" in output
    assert "rollout.engine = 'embedded' has no such key; it belongs to 'parrot'" in output


def test_a_key_is_one_line_and_its_use(package):
    use = f"recipe_from_table({table(optimizer={'momentum': 0.5})!r}).optimizer.momentum"
    program = f"from moe_replay.recipe.load import recipe_from_table; print({use})"
    # The control: nothing knows it yet.
    with pytest.raises(AssertionError, match=r"optimizer\.momentum: set to 0.5, but there is no"):
        run(package, program)
    insert(package / "recipe" / "sections" / "training.py", "    beta1: float", KEY)
    assert run(package, program) == "0.5\n"
