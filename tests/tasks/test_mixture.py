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


def test_a_changed_mixture_goes_on_in_each_dataset_where_it_was() -> None:
    def numbers(prompts: list[Prompt], name: str) -> list[int]:
        return [prompt.index for prompt in prompts if prompt.dataset == name]

    before = mixed(1, 1)
    first = before.at(0, 5000)
    reached = {name: len(numbers(first, name)) for name in "ab"}
    assert before.draws(5000) == reached and sum(reached.values()) == 5000
    # Other weights, and a dataset that was not there.
    changed = mixed(1, 9, 5)
    changed.go_on(5000, reached)
    later = changed.at(5000, 4000)
    for name, start in (*reached.items(), ("c", 0)):
        own = numbers(later, name)
        assert own == list(range(start, start + len(own)))
    assert len(numbers(later, "b")) > 5 * len(numbers(later, "a")) > 0
    # Exact at the next resume too, in whatever parts it is asked for.
    again = mixed(1, 9, 5)
    again.go_on(7000, changed.draws(7000))
    assert said(again.at(7000, 2000)) == said(later[2000:])
    assert said(changed.at(5003, 7)) == said(later[3:10])
    # One that is left out and comes back goes on too.
    alone = mixed(1)
    alone.go_on(9000, changed.draws(9000))
    both = mixed(1, 1)
    both.go_on(9500, alone.draws(9500))
    assert min(numbers(both.at(9500, 50), "b")) == changed.draws(9000)["b"]
    assert min(numbers(both.at(9500, 50), "a")) == changed.draws(9000)["a"] + 500
    # The control: without a change nothing moves, and without the draws everything does.
    same = mixed(1, 1)
    same.go_on(5000, reached)
    assert said(same.at(5000, 300)) == said(before.at(5000, 300))
    assert numbers(mixed(1, 9, 5).at(5000, 300), "a")[0] < reached["a"]


def test_columns_of_other_datasets_are_none_and_the_step_reaches_all() -> None:
    prompts = mixed(1, 1).at(0, 50, step=7)
    assert {prompt.text for prompt in prompts} == {"step 7"}
    for prompt in prompts:
        other = "b" if prompt.dataset == "a" else "a"
        assert prompt.columns == {"all": prompt.index, prompt.dataset: prompt.index, other: None}
    whole = mixed(1, 1)
    assert (whole.columns, whole.num_deleted, whole.num_prompts) == ({"all", "a", "b"}, 2, None)
