"""Reward functions: how they are found and called, and that a bad one is named with its sample."""

import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.run import DataSection, RewardSection
from moe_replay.tasks.encoding import Prompt, PromptEncoder
from moe_replay.tasks.generated import GeneratedTask
from moe_replay.tasks.prompts import GeneratedPrompts
from moe_replay.tasks.rewards.functions import Signature, load_function
from moe_replay.tasks.rewards.rewards import RewardSet
from moe_replay.tasks.rewards.worker import WrongAnswer, checked_scores
from moe_replay.testing.tiny_models import character_tokenizer


def prompts(count: int, **columns: list) -> list[Prompt]:
    return [
        Prompt(
            index=n,
            prompt_ids=np.array([n], dtype=np.int32),
            text=f"question {n}",
            columns={name: values[n] for name, values in columns.items()},
        )
        for n in range(count)
    ]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RewardSet]]:
    """Return a function that loads f of a file with the given code."""
    opened: list[RewardSet] = []

    def load(code: str, **options) -> RewardSet:
        path = tmp_path / "reward.py"
        path.write_text(code)
        spec = RewardSection(function=f"{path}:f", name="mine", **options)
        opened.append(RewardSet.load([spec]))
        return opened[-1]

    yield load
    for rewards in opened:
        rewards.close()


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Signature]]:
    """Return a function that finds f of a file with the given code in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def found(code: str, **args) -> Signature:
        path = tmp_path / "found_here.py"
        path.write_text(code)
        return load_function(f"{path}:f", args)[1]

    yield found
    sys.modules.pop("found_here", None)


def builtin(function: str, **options) -> RewardSet:
    """Return a built-in, whose process ends with it."""
    return RewardSet.load([RewardSection(function=function, name=function, **options)])


def score(rewards: RewardSet, completions: list[str], **columns: list) -> list[float]:
    ids = [[ord(letter) for letter in text] for text in completions]
    return rewards.score(prompts(len(completions), **columns), completions, ids).total.tolist()


class Columns:
    """A prompt source of which only the columns matter."""

    num_prompts = None
    num_deleted = 0

    def __init__(self, *names: str) -> None:
        self.columns = frozenset(names)

    def at(self, position: int, count: int) -> list[Prompt]:
        raise NotImplementedError


def test_function_gets_the_names_that_it_takes(load):
    rewards = load(
        "def f(completions, *, prompts, completion_ids, answer, scale=1.0):\n"
        "    assert prompts == ['question 0', 'question 1']\n"
        "    return [scale * (c == a) + len(i) for c, a, i in zip(completions, answer, completion_ids)]\n",
        args={"scale": 10.0},
    )
    assert score(rewards, ["a", "bc"], answer=["a", "x"], other=[1, 2]) == [11.0, 2.0]


def test_function_with_kwargs_gets_every_column(load):
    rewards = load("def f(completions, **columns):\n    return [len(columns)] * 1\n")
    # prompts, completion_ids and two columns.
    assert score(rewards, ["a"], one=[1], two=[2]) == [4.0]


def test_total_is_the_weighted_sum(tmp_path):
    (tmp_path / "r.py").write_text(
        "def one(completions): return [1] * len(completions)\n"
        "def length(completions): return [len(c) for c in completions]\n"
    )
    specs = [
        RewardSection(function=f"{tmp_path}/r.py:one", name="one", weight=0.5),
        RewardSection(function=f"{tmp_path}/r.py:length", name="length", weight=-2.0),
    ]
    with RewardSet.load(specs) as rewards:
        batch = rewards.score(prompts(2), ["a", "bbb"], [[1], [2]])
    assert rewards.names == ("one", "length")
    assert batch.scores["length"].tolist() == [1.0, 3.0]
    assert batch.total.tolist() == [-1.5, -5.5]


def test_async_functions_run_together(tmp_path):
    # Each waits for the other one to have started: one after the other would never end.
    (tmp_path / "r.py").write_text(
        "import asyncio\n"
        "started = []\n"
        "async def wait(completions, me):\n"
        "    started.append(me)\n"
        "    while len(started) < 2:\n"
        "        await asyncio.sleep(0)\n"
        "    return [1.0] * len(completions)\n"
        "async def one(completions): return await wait(completions, 1)\n"
        "async def two(completions): return await wait(completions, 2)\n"
    )
    specs = [RewardSection(function=f"{tmp_path}/r.py:{n}", name=n) for n in ("one", "two")]
    with RewardSet.load(specs) as rewards:
        assert score(rewards, ["a"]) == [2.0]


def test_sync_function_may_run_an_event_loop(load):
    code = (
        "import asyncio\nasync def g(): return 2.0\n"
        "def f(completions): return [asyncio.run(g()) for _ in completions]\n"
    )
    assert score(load(code), ["a"]) == [2.0]


@pytest.mark.parametrize(
    "value", [True, 1, np.float32(1), np.bool_(True), torch.tensor(1.0), Fraction(1)]
)
def test_numbers_of_other_types_are_accepted(value):
    assert checked_scores([value] * 2, 2) == [1.0, 1.0]


@pytest.mark.parametrize("result", [np.ones(2), torch.ones(2, requires_grad=True), (1, True)])
def test_other_sequences_are_accepted(result):
    assert checked_scores(result, 2) == [1.0, 1.0]


def test_no_completions_call_no_function(load):
    rewards = load("def f(completions): raise AssertionError\n")
    assert score(rewards, []) == []


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_function_that_raises_is_named_with_its_sample_cause_and_line(load, kind):
    code = f"{kind} f(completions):\n    return [1 / len(c) for c in completions]\n"
    with pytest.raises(RewardError) as caught:
        score(load(code), ["a", "b", "", "d", "e"])
    message = str(caught.value)
    assert "reward mine" in message
    assert "raised ZeroDivisionError: division by zero (" in message
    assert "reward.py, line 2); on sample 2 (prompt 'question 2'" in message
    assert "Return a score for such a completion" in message
    assert "ZeroDivisionError" in str(caught.value.__cause__)


def test_function_that_raises_on_whole_batches_only_says_so(load):
    code = "def f(completions):\n    assert len(completions) < 3\n    return [0.0] * len(completions)\n"
    with pytest.raises(RewardError, match=r"no single sample .it fails only on the batch of 3"):
        score(load(code), ["a", "b", "c"])


def test_score_that_is_not_a_number_is_named_with_its_sample(load):
    with pytest.raises(
        RewardError, match=r"reward mine .*returned nan for sample 1 \(prompt 'question 1'.*None"
    ):
        score(load("def f(completions): return [0.0, float('nan')]\n"), ["a", "b"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("1.0", "'1.0'"),
        ([1.0], r"\[1.0\]"),
        (10**400, "too large for a float"),
    ],
)
def test_score_that_is_no_finite_number_is_refused(value, shown):
    with pytest.raises(WrongAnswer, match=shown) as caught:
        checked_scores([0.0, value], 2)
    assert caught.value.sample == 1


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0] * 3, "returned 3 scores for 2 completions"),
        (1.0, r"returned 1.0 \(float\), expected a list of 2 numbers"),
        (None, r"returned None \(NoneType\), expected a list"),
        ((c for c in "ab"), "expected a list"),
    ],
)
def test_result_that_is_not_one_score_a_sample_is_refused(result, message):
    with pytest.raises(WrongAnswer, match=message):
        checked_scores(result, 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("exact_mach", r"not one of reasoning_gym, .* \(nearest: 'exact_match'\)"),
        ("no.such.module:f", "module 'no.such.module' cannot be imported: ModuleNotFoundError"),
        ("json:dumpss", "json has no function 'dumpss'; its functions are .*dumps"),
        ("collections:Counter", "collections has a type, not a function, 'Counter'"),
        ("nowhere/reward.py:f", r"file nowhere/reward.py does not exist"),
        ("posixpath:isabs", "takes no argument named completions"),
    ],
)
def test_function_that_cannot_be_found_is_refused(function, message):
    with pytest.raises(RecipeError, match=message):
        load_function(function, {})


def test_refusal_of_the_reward_process_is_a_recipe_error(load):
    with pytest.raises(RecipeError, match=r"reward.py cannot be imported: SyntaxError"):
        load("def f(:\n")


def test_completions_by_position_only_are_refused(found):
    with pytest.raises(RecipeError, match="takes no argument named completions"):
        found("def f(completions, /, **columns): ...\n")


def test_argument_that_the_function_does_not_take_is_refused(found):
    with pytest.raises(RecipeError, match=r"sets scal, but it takes completions, scale"):
        found("def f(completions, scale=1): ...\n", scal=2)


def test_r13_argument_under_the_name_of_what_every_call_passes_is_refused(found):
    with pytest.raises(RecipeError, match=r"sets prompts, which every call passes"):
        found("def f(completions, **columns): ...\n", prompts=2)


def test_check_accepts_a_dataset_with_the_columns():
    builtin("exact_match").check(Columns("answer", "other"))


def test_check_names_the_missing_column_and_those_found():
    with pytest.raises(
        RecipeError,
        match=r"needs answer, but the dataset's columns are answers, q \(nearest.*answers",
    ):
        builtin("exact_match").check(Columns("answers", "q"))


def test_check_counts_args_as_given(load):
    load("def f(completions, scale): ...\n", args={"scale": 2}).check(Columns())


def test_check_refuses_an_argument_that_is_also_a_column(load):
    rewards = load("def f(completions, scale): ...\n", args={"scale": 2})
    with pytest.raises(RecipeError, match=r"scale is both a dataset column and a key"):
        rewards.check(Columns("scale"))


def test_check_finds_a_broken_regex():
    with pytest.raises(RecipeError, match=r"\[rewards.args\] .* is rejected: .*unterminated"):
        builtin("format", args={"regex": "("}).check(Columns())


def test_check_finds_a_missing_regex():
    with pytest.raises(RecipeError, match=r"needs regex"):
        builtin("format").check(Columns("answer"))


def test_exact_match_takes_the_last_tagged_answer_or_the_whole_text():
    completions = ["<answer>1</answer> <answer> 4\n</answer>", " 4 ", "it is 4", "<final>4</final>"]
    assert score(builtin("exact_match"), completions, answer=[4] * 4) == [1.0, 1.0, 0.0, 0.0]
    tagged = builtin("exact_match", args={"answer_tag": "final"})
    assert score(tagged, completions, answer=[4] * 4) == [0.0, 1.0, 0.0, 1.0]


def test_exact_match_refuses_an_empty_answer():
    with pytest.raises(RewardError, match=r"column answer is empty.*on sample 1"):
        score(builtin("exact_match"), ["a", "b"], answer=["a", None])


def test_format_matches_the_whole_completion():
    rewards = builtin("format", args={"regex": "<think>.*</think>.+"})
    completions = ["<think>a\nb</think>c", "<think>a</think>", "x<think>a</think>c"]
    assert score(rewards, completions) == [1.0, 0.0, 0.0]


def test_d5_format_counts_the_tag_that_the_template_opened():
    rewards = builtin("format", args={"regex": "<think>.*</think>.+"})
    ids = np.array([1], dtype=np.int32)
    opened = [
        Prompt(index=n, prompt_ids=ids, text=text, columns={})
        for n, text in enumerate(["<user>1<think>\n", "<think>", "<think>x", "<|think|>", ""])
    ]
    written = ["a</think>b"] * 5
    assert rewards.score(opened, written, [[1]] * 5).total.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    # A regex that was written for such a template, without the tag, holds as before.
    bare = builtin("format", args={"regex": "[^<]*</think>.+"})
    assert bare.score(opened[:1], written[:1], [[1]]).total.tolist() == [1.0]


@pytest.mark.parametrize(("text", "expected"), [("?<answer>", 1.0), ("?<think>", 0.0)])
def test_d5_answer_in_a_tag_that_the_template_opened_is_found(text, expected):
    ids = np.array([1], dtype=np.int32)
    asked = [Prompt(index=0, prompt_ids=ids, text=text, columns={"answer": "4"})]
    batch = builtin("exact_match").score(asked, ["4</answer> yes"], [[1]])
    assert batch.total.tolist() == [expected]


def test_reasoning_gym_scores_by_the_family():
    source = GeneratedPrompts(
        task=GeneratedTask("chain_sum", {}),
        seed=1,
        encoder=PromptEncoder(tokenizer=character_tokenizer(), data=DataSection(train="")),
    )
    rewards = builtin("reasoning_gym")
    rewards.check(source)
    asked = source.at(0, 2)
    completions = [
        f"so <answer>{asked[0].columns['answer']}</answer>",
        "<answer>no idea</answer>",
    ]
    batch = rewards.score(asked, completions, [[1], [1]])
    assert batch.total[0] == 1.0
    assert batch.total[1] < 0.1


def test_reasoning_gym_needs_generated_items():
    with pytest.raises(RecipeError, match=r"reward reasoning_gym .* needs .*task"):
        builtin("reasoning_gym").check(Columns("answer"))


EQUAL = [r"The answer is $\frac{1}{2}$", "so 0.5", r"\boxed{1/2}", "it is 2", "no number at all"]


def test_math_verify_compares_values_not_texts():
    assert score(builtin("math_verify"), EQUAL, answer=["1/2"] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_math_verify_works_outside_the_main_thread():
    results: list[list[float]] = []
    rewards = builtin("math_verify")
    thread = threading.Thread(
        target=lambda: results.append(score(rewards, EQUAL, answer=[r"\frac{1}{2}"] * 5))
    )
    thread.start()
    thread.join()
    assert results == [[1.0, 1.0, 1.0, 0.0, 0.0]]


def test_math_verify_refuses_an_answer_that_is_no_mathematics():
    with pytest.raises(
        RewardError, match=r"cannot parse the answer of sample 0 as a math expression: ''"
    ):
        score(builtin("math_verify"), ["1"], answer=[""])
