"""Print the tables of docs/transformers.md.

Example:
    $ python -m tests.transformers.families.table families
"""

from __future__ import annotations

import sys

from tests.transformers.families.references import WORDS

from moe_replay.testing.moe_families import MOE_FAMILIES, tiny_family
from moe_replay.transformers import find_routers
from moe_replay.transformers.routers.sites import FIXED, REFUSED

REFUSED_IN = {
    "switch_transformers": "SwitchTransformersTop1Router",
    "nllb_moe": "NllbMoeTop2Router",
    "doge": "DogeCDMoE",
    "vitpose_backbone": "VitPoseBackboneMoeMLP",
    "jetmoe": "JetMoeTopKGating",
}
"""Family without replay -> the class by which it is refused."""


def families() -> list[str]:
    """Return the table of families that pass every proof, but for the ones it names."""
    rows = [
        "| Family | Proven on | Router | Weights of experts | Not run |",
        "|---|---|---|---|---|",
    ]
    for name, family in MOE_FAMILIES.items():
        routers = {type(site.module).__name__ for site in find_routers(tiny_family(name))}
        without = "; ".join(f"{proof}: {why}" for proof, why in family.without.items())
        rows.append(
            f"| {name} | `{family.model}` | `{', '.join(sorted(routers))}` | {WORDS[name]} | {without} |"
        )
    return rows


def refused() -> list[str]:
    """Return the table of what is refused by name."""
    rows = ["| Family | Class | Why |", "|---|---|---|"]
    rows += [f"| {name} | `{kind}` | {REFUSED[kind]} |" for name, kind in REFUSED_IN.items()]
    rows += [
        f"| deepseek_v4 | `{kind}` | its layers take experts by the token's id: nothing is chosen, so they are left alone |"
        for kind in sorted(FIXED)
    ]
    return rows


if __name__ == "__main__":
    print("\n".join({"families": families, "refused": refused}[sys.argv[1]]()))
