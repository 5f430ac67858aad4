"""What can be checked of a reward function before anything is sampled."""

from __future__ import annotations

from moe_replay.errors import RecipeError, nearest_of
from moe_replay.recipe.sections.run import RewardSection
from moe_replay.tasks.prompts import PromptSource
from moe_replay.tasks.rewards.builtin import BUILTIN_REWARDS
from moe_replay.tasks.rewards.functions import OWN_NAMES, Signature


def is_asked(spec: RewardSection, dataset: str) -> bool:
    """Return whether a function scores the completions of a dataset, by its name."""
    return not spec.datasets or dataset in spec.datasets


def check_columns(spec: RewardSection, signature: Signature, source: PromptSource) -> None:
    """Raise `RecipeError` unless a dataset has every column that a function requires."""
    clash = sorted(set(spec.args) & source.columns)
    if clash:
        raise RecipeError(
            f"reward {spec.name}: {', '.join(clash)} is both a dataset column and a key of [rewards.args]: rename one"
        )
    missing = sorted(set(signature.required) - source.columns - set(spec.args))
    if missing:
        nearest = nearest_of(missing[0], source.columns)
        raise RecipeError(
            f"reward {spec.name} ({spec.function}) needs {', '.join(missing)}, but the dataset's columns are "
            f"{', '.join(sorted(source.columns)) or 'none'}{nearest}: add the column, or set it in [rewards.args]"
        )


def try_on_nothing(spec: RewardSection, signature: Signature) -> None:
    """Call a built-in on an empty batch, so that a bad argument fails at the start."""
    names = {*signature.required, *OWN_NAMES}
    arguments = {name: [] for name in names if signature.takes(name)} | spec.args
    try:
        BUILTIN_REWARDS[spec.function](**arguments)
    except Exception as error:
        raise RecipeError(
            f"reward {spec.name}: [rewards.args] {spec.args!r} is rejected: {type(error).__name__}: {error}"
        ) from error
