"""Several datasets as one: drawn by weight, in order within each, the same at every ask."""

from dataclasses import dataclass

import numpy as np

from moe_replay.tasks.encoding import Prompt
from moe_replay.tasks.mixture import MixedPrompts, Part


@dataclass
class Counted:
    """A source whose prompt n says n, and which remembers the steps that asked."""

    columns: frozenset[str]
    name: str
    num_prompts: int | None = None
    num_deleted: int = 1

    def at(self, position: int, count: int, *, step: int = 1) -> list[Prompt]:
        return [
            Prompt(
                index=n,
                text=f"step {step}",
                prompt_ids=np.array([1], dtype=np.int32),
                columns=dict.fromkeys(self.columns, n),
                dataset=self.name,
            )
            for n in range(position, position + count)
        ]


def mixed(*weights: float, seed: int = 0) -> MixedPrompts:
    names = "abcd"[: len(weights)]
    parts = [
        Part(name=name, weight=weight, source=Counted(frozenset({"all", name}), name))
        for name, weight in zip(names, weights, strict=True)
    ]
    return MixedPrompts(parts, seed=seed)


def said(prompts: list[Prompt]) -> list[tuple[str, int]]:
    return [(prompt.dataset, prompt.index) for prompt in prompts]


def test_each_dataset_gives_its_prompts_in_order_and_none_is_left_out() -> None:
    drawn = said(mixed(2, 1, 1).at(0, 9000))
    for name in "abc":
        own = [index for dataset, index in drawn if dataset == name]
        assert own == list(range(len(own)))


def test_prompts_depend_on_their_position_alone() -> None:
    # More than two blocks of draws.
    every = said(mixed(3, 1).at(0, 9000))
    for start, count in ((0, 1), (4090, 20), (4096, 3), (8191, 2), (8999, 1), (17, 5000)):
        assert said(mixed(3, 1).at(start, count)) == every[start : start + count]
    again = mixed(3, 1)
    assert [said(again.at(n, 1))[0] for n in (8000, 12, 5000)] == [
        every[n] for n in (8000, 12, 5000)
    ]
    assert mixed(3, 1).at(5, 0) == []
    # Another seed draws otherwise, and only one weight draws from one.
    assert said(mixed(3, 1, seed=1).at(0, 9000)) != every
    assert said(mixed(5.0).at(3, 2)) == [("a", 3), ("a", 4)]


def test_datasets_are_drawn_in_proportion_to_their_weights() -> None:
    drawn = said(mixed(0.6, 0.3, 0.1).at(0, 9000))
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        count = sum(dataset == name for dataset, _ in drawn)
        assert abs(count - 9000 * share) < 4 * (9000 * share * (1 - share)) ** 0.5
    # They are mixed, not dealt block by block: any 100 positions hold all of them.
    assert all({name for name, _ in drawn[n : n + 100]} == set("abc") for n in range(0, 9000, 100))


def test_columns_of_other_datasets_are_none_and_the_step_reaches_all() -> None:
    prompts = mixed(1, 1).at(0, 50, step=7)
    assert {prompt.text for prompt in prompts} == {"step 7"}
    for prompt in prompts:
        other = "b" if prompt.dataset == "a" else "a"
        assert prompt.columns == {"all": prompt.index, prompt.dataset: prompt.index, other: None}
    whole = mixed(1, 1)
    assert (whole.columns, whole.num_deleted, whole.num_prompts) == ({"all", "a", "b"}, 2, None)
