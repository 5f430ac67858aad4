"""The rules between keys about what training prompts are drawn from."""

from __future__ import annotations

from collections.abc import Iterator

from moe_replay.errors import nearest_of
from moe_replay.recipe.rule import EffectRule, Problem, Rule
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.recipe.sections.locations import GENERATED, has_splits
from moe_replay.recipe.sections.mixture import CurriculumSection, MixtureSection
from moe_replay.recipe.sections.run import DataSection, HeldOutSection, RewardSection


def trained_on(data: DataSection, mixture: tuple[MixtureSection, ...]) -> list[str]:
    """Return where the datasets to train on are."""
    return [data.train] if data.train is not None else [entry.dataset for entry in mixture]


@Rule
def _there_is_one_way_to_name_datasets(
    data: DataSection, mixture: tuple[MixtureSection, ...]
) -> Iterator[Problem]:
    if data.train is None and not mixture:
        text = (
            "missing, and there is no [[mixture]] table: name the dataset to train on, or several of "
            "them in [[mixture]] tables"
        )
        yield Problem("data.train", text)
    if data.train is not None and mixture:
        text = (
            f"{data.train!r} beside [[mixture]], which names all datasets to train on: remove it, or "
            "make it a table of [[mixture]]"
        )
        yield Problem("data.train", text)


@Rule
def _names_of_a_mixture_differ(mixture: tuple[MixtureSection, ...]) -> Iterator[Problem]:
    names = [entry.name for entry in mixture]
    for number, name in enumerate(names):
        if name in names[:number]:
            text = f"{name!r} is taken, and metrics go by that name; give it another one"
            yield Problem(f"mixture.{number}.name", text)


@Rule
def _rewards_score_sets_that_exist(
    data: DataSection,
    mixture: tuple[MixtureSection, ...],
    held_out: tuple[HeldOutSection, ...],
    rewards: tuple[RewardSection, ...],
    environment: EnvironmentSection | None,
) -> Iterator[Problem]:
    known = list(dict.fromkeys(entry.name for entry in (*mixture, *held_out)))
    for number, reward in enumerate(rewards):
        for name in reward.datasets:
            if name not in known:
                text = (
                    f"{name!r} is not the name of a set of [[mixture]] or [[held_out]], which are "
                    f"{', '.join(known) or 'none'}{nearest_of(name, known)}"
                )
                yield Problem(f"rewards.{number}.datasets", text)
    if environment is not None or not rewards or not all(reward.datasets for reward in rewards):
        return
    scored = {name for reward in rewards for name in reward.datasets}
    silent = [("mixture", entry.name) for entry in mixture if entry.name not in scored]
    silent += [("held_out", entry.name) for entry in held_out if entry.name not in scored]
    silent += [("data", key) for key in ("train", "eval") if getattr(data, key) is not None]
    for section, name in silent:
        text = (
            f"no reward function scores the completions of {name!r} in [{section}]: each of them has "
            "datasets, and none names it; data.train and data.eval have no name to give"
        )
        yield Problem("rewards", text)


@Rule
def _a_curriculum_has_numbers(
    curriculum: CurriculumSection, data: DataSection, mixture: tuple[MixtureSection, ...]
) -> Iterator[Problem]:
    for location in trained_on(data, mixture):
        if location.startswith(GENERATED):
            text = (
                f"{location!r} has no column {curriculum.column!r}: generated items have no number to "
                "choose by; remove [curriculum], or train on files"
            )
            yield Problem("curriculum.column", text, is_unsupported=True)
    for number, (low, high) in enumerate(curriculum.bands):
        if low > high:
            text = f"got [{low:g}, {high:g}], expected the smaller number first"
            yield Problem(f"curriculum.bands.{number}", text)
    if curriculum.bands and len(curriculum.band_steps) != len(curriculum.bands) - 1:
        text = (
            f"got {len(curriculum.band_steps)} for {len(curriculum.bands)} bands, expected one fewer "
            "than bands: the last one stays to the end"
        )
        yield Problem("curriculum.band_steps", text)


@EffectRule
def _curriculum_without_effect(curriculum: CurriculumSection) -> Iterator[tuple[str, str]]:
    if curriculum.bands:
        yield "curriculum.order", "curriculum.bands is set, whose prompts come as data.shuffle says"
    else:
        yield "curriculum.band_steps", "curriculum.bands is not set"


@EffectRule
def _mixture_without_effect(mixture: tuple[MixtureSection, ...]) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(mixture):
        if not entry.dataset.startswith(GENERATED):
            yield f"mixture.{number}.seed", "its dataset is a file"
            yield f"mixture.{number}.task", "its dataset is a file"
        if not has_splits(entry.dataset):
            why = "its dataset is neither a folder nor a dataset of the hub"
            yield f"mixture.{number}.split", why
