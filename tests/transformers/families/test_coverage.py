"""No MoE family of the installed transformers is unknown: each is proven, or refused by name."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tests.transformers.families.references import REFERENCES
from tests.transformers.families.table import REFUSED_IN, families, refused

from moe_replay.errors import UnsupportedError
from moe_replay.testing.moe_families import MOE_FAMILIES, tiny_family
from moe_replay.transformers import find_routers
from moe_replay.transformers.routers.sites import FIXED, REFUSED

ROOT = Path(__file__).parents[3]
MODELS = Path(transformers.__file__).parent / "models"
FIELD = re.compile(
    r"num_experts|routed_experts|local_experts|experts_per_tok|moe_k$|moe_top_?k|top_k_experts|expert_capacity"
)
MODULE = re.compile(
    r"(Experts?|Router|Gate|Gating|Mo[eE](MLP|Block|Layer|SparseMoeBlock)?|SparseMLP)$"
)

# Classes by name alone; none of them sends tokens to experts.
NO_MOE = {
    "d_fine": "its gate mixes two decoder queries",
    "deimv2": "its gate mixes two decoder queries",
    "granite_docling": "its router picks image tiles",
}
GATES_OF_OTHERS = re.compile(r"(Forget|Residual|DFine|Deimv2)Gate$|GraniteDoclingDensityRouter$")
# Routers beside the proven one of their family: each proves itself at its first call like any.
BESIDE = {
    "Qwen3OmniMoeTextTopKRouter": "no model of transformers builds it",
    "Qwen3OmniMoeTalkerTextTopKRouter": "of the speech talker, a stack of its own",
    "Dots3NoteVisionTopKRouter": "of the vision tower, whose rows are no tokens",
}


@cache
def classes(family: str, kind: str) -> dict[str, ast.ClassDef]:
    found = {}
    for path in (MODELS / family).glob(f"{kind}_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
    return found


def fields(node: ast.ClassDef) -> set[str]:
    return {
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def has_expert_fields(family: str) -> bool:
    named = set().union(*(fields(node) for node in classes(family, "configuration").values()))
    return any(FIELD.search(name) for name in named)


def expert_modules(family: str) -> set[str]:
    return {
        name
        for name in classes(family, "modeling")
        if MODULE.search(name) and not GATES_OF_OTHERS.search(name)
    }


def installed() -> list[str]:
    return sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def test_every_family_with_experts_is_proven_or_refused() -> None:
    moe = {name for name in installed() if has_expert_fields(name) or expert_modules(name)}
    assert moe == {*MOE_FAMILIES, *REFUSED_IN}
    assert len(MOE_FAMILIES) >= 60
    assert set(REFERENCES) == set(MOE_FAMILIES)


def test_every_router_class_is_proven_refused_or_named() -> None:
    proven = {
        type(site.module).__name__
        for name in MOE_FAMILIES
        for site in find_routers(tiny_family(name))
    }
    listed = {
        name
        for family in (*MOE_FAMILIES, *REFUSED_IN)
        for name in expert_modules(family)
        if re.search(r"(Router|Gate|Gating)$", name)
    }
    assert listed - proven == {*BESIDE, *FIXED, *(REFUSED.keys() & listed)}


def test_control_a_family_that_a_release_adds_is_noticed() -> None:
    planted = ast.parse("class NewConfig:\n    num_local_experts: int = 8").body[0]
    assert isinstance(planted, ast.ClassDef)
    assert any(FIELD.search(name) for name in fields(planted))
    assert not any(FIELD.search(name) for name in ("hidden_size", "num_heads", "expert"))
    assert MODULE.search("NewTopKRouter") and not MODULE.search("NewDecoderLayer")


@pytest.mark.parametrize("family", REFUSED_IN)
def test_a_refused_family_is_refused_by_name(family: str) -> None:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_class = {
        "switch_transformers": "SwitchTransformersForConditionalGeneration",
        "nllb_moe": "NllbMoeForConditionalGeneration",
        "doge": "DogeForCausalLM",
        "vitpose_backbone": "VitPoseBackbone",
        "jetmoe": "JetMoeForCausalLM",
    }[family]
    chosen = getattr(module, model_class)
    options = {
        "doge": {"is_moe": True, "num_experts": 16, "num_hidden_layers": 2},
        "vitpose_backbone": {"num_experts": 2, "num_hidden_layers": 2},
        "nllb_moe": {"encoder_layers": 4, "decoder_layers": 4, "vocab_size": 64},
    }.get(family, {"num_hidden_layers": 2})
    with torch.device("meta"):
        model = chosen(chosen.config_class(**options))
    kind = REFUSED_IN[family]
    with pytest.raises(UnsupportedError, match=f"{kind}.*{re.escape(REFUSED[kind])}"):
        find_routers(model)


@pytest.mark.parametrize(("name", "table"), [("families", families), ("refused", refused)])
def test_the_tables_of_the_docs_are_what_is_proven(name, table) -> None:
    text = (ROOT / "docs" / "transformers.md").read_text()
    held = text.partition(f"<!-- {name}: begin -->\n\n")[2].partition(f"\n\n<!-- {name}: end -->")[
        0
    ]
    assert held.splitlines() == table()
