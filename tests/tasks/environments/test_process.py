"""Environments in their own process: what they are given, and what becomes of their failures."""

import numpy as np
import pytest

from moe_replay.errors import RecipeError, RewardError
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.tasks.environments.client import Action, EnvironmentProcess, Start
from moe_replay.tasks.environments.tool_calls import ToolCall

CODE = '''
import asyncio, os, random, signal, time

class Tools:
    def __init__(self, start=0):
        self.total = start

    def reset(self, *, start_at, seed):
        self.total, self.seed = start_at, seed
        return f"{seed % 97} {random.random()}"

    def add(self, a: int):
        """Add to the total.

        Args:
            a: what to add
        """
        self.total += a
        return self.total

    async def slow(self, seconds: float):
        """Wait.

        Args:
            seconds: how long
        """
        await asyncio.sleep(seconds)
        return "waited"

    def spin(self):
        """Never return."""
        while True:
            pass

    def fail(self):
        """Raise."""
        raise ValueError("no luck")

    def leave(self):
        """End the process."""
        os._exit(3)

    def _private(self):
        pass

    def get_reward(self):
        return None if self.total < 0 else self.total / 2

class Count:
    def reset(self, **row):
        self.heard = []
        self.finished = False

    def step(self, text):
        self.heard.append(text)
        if text == "bad":
            raise RuntimeError("not that")
        self.finished = text == "done"
        return None if text == "over" else f"{len(self.heard)}:{text}"

class Gym:
    def __init__(self, config):
        self.most = config["most"]

    async def reset(self, config):
        self.left = self.most
        return f"begin {config.data_dict['start_at']}", {}, "be brief"

    async def step(self, messages):
        self.left -= 1
        return f"left {self.left} of {len(messages)}", 0.5, self.left == 0, {}

    async def close(self):
        pass

class NoReset:
    def add(self, a: int):
        """Add."""

class Untyped:
    def reset(self): ...
    def add(self, a):
        """Add."""

class Deck:
    def __init__(self):
        self.cards, self.played = random.sample(range(1000), 5), 0
    def reset(self, **row): ...
    def step(self, text):
        self.played += 1
        return f"{self.played} {self.cards}"

class Deaf:
    def reset(self): ...
    def no_alarm(self):
        """Ignore alarms."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    def spin(self):
        """Never return."""
        while True:
            pass

class Closed:
    log = []
    def __init__(self, config): ...
    def reset(self, config):
        return " ".join(self.log), {}, ""
    def step(self, messages): ...
    def close(self):
        self.log.append("closed")

class Worlds:
    def reset(self, *, world, **row):
        self.inner = {"deck": Deck, "count": Count}[world]()
        return self.inner.reset(**row)
    def step(self, text):
        return self.inner.step(text)

class Broken:
    def reset(self):
        raise KeyError("gone")
    def add(self):
        """Add."""
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("environments")
    (path / "envs.py").write_text(CODE)
    return path


def opened(folder, name, **keys) -> EnvironmentProcess:
    section = EnvironmentSection(factory=f"{folder}/envs.py:{name}", **keys)
    return EnvironmentProcess(section)


@pytest.fixture(scope="module")
def tools(folder):
    with opened(folder, "Tools", timeout_s=300.0) as process:
        yield process


@pytest.fixture(scope="module")
def hasty_tools(folder):
    """Return tools with a limit that calls meet; one that does not hang is far below it."""
    with opened(folder, "Tools", timeout_s=2.0) as process:
        yield process


def start(slot=0, seed=5, **row) -> Start:
    return Start(slot=slot, seed=seed, row={"start_at": 10, "other": 1, **row})


def act(process, *calls: ToolCall, slot=0):
    (reaction,) = process.act([Action(slot=slot, text="", calls=calls)])
    return reaction


def test_public_methods_are_tools_and_their_schemas_those_of_transformers(tools):
    described = tools.description
    assert [tool["function"]["name"] for tool in described.tools] == [
        *("add", "fail", "leave", "slow", "spin")
    ]
    assert described.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer", "description": "what to add"}},
        "required": ["a"],
    }
    assert described.has_reward and set(described.required) == {"start_at", "seed"}


def test_conversations_of_one_seed_begin_alike_and_others_do_not(tools):
    same, again, other = tools.reset([start(0), start(1), start(2, seed=6)])
    assert same == again
    assert other != same


def test_each_conversation_has_a_state_of_its_own(tools):
    tools.reset([start(0), start(1, start_at=-50)])
    assert act(tools, ToolCall(name="add", arguments={"a": 2})).texts == ("12",)
    twice = [ToolCall(name="add", arguments={"a": n}) for n in (1, 2)]
    assert act(tools, *twice, slot=1).texts == ("-49", "-47")
    rewards = tools.rewards([0, 1])
    assert rewards[0] == 6.0 and np.isnan(rewards[1])


def test_a_column_chooses_the_world_of_its_row(folder):
    rows = [start(0, world="count"), start(1, world="deck"), start(2, world="count")]
    with opened(folder, "Worlds", form="step") as process:
        process.reset(rows)
        said = process.act([Action(slot=slot, text="go", calls=()) for slot in range(3)])
        texts = [reaction.texts[0] for reaction in said]
        assert texts[0] == texts[2] == "1:go"
        assert texts[1].startswith("1 [")
        with pytest.raises(RewardError, match="moon"):
            process.reset([start(0, world="moon")])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall(name="fail"), '{"error": "no luck"}'),
        (ToolCall(name="add", arguments={"b": 1}), "unexpected keyword argument 'b'"),
        (ToolCall(name="_private"), "there is no tool _private; the tools are add, fail"),
        (ToolCall(name="reset"), "there is no tool reset"),
        (ToolCall(name="", error="not valid JSON"), '{"error": "not valid JSON"}'),
    ],
)
def test_a_failing_call_tells_the_model_why(tools, call, said):
    tools.reset([start()])
    reaction = act(tools, call, ToolCall(name="add", arguments={"a": 1}))
    assert said in reaction.texts[0]
    # The control: the call beside it works, and is no failure.
    assert (reaction.texts[1], reaction.num_failed) == ("11", 1)


@pytest.mark.parametrize(
    "call", [ToolCall(name="spin"), ToolCall(name="slow", arguments={"seconds": 3600})]
)
def test_a_call_that_is_late_is_interrupted_and_the_conversation_goes_on(hasty_tools, call):
    hasty_tools.reset([start()])
    quick = ToolCall(name="slow", arguments={"seconds": 0.0})
    reaction = act(hasty_tools, call, quick)
    assert "still running after 2 s" in reaction.texts[0]
    assert (reaction.texts[1], reaction.num_failed) == ("waited", 1)


def test_a_process_that_ends_stops_the_run_and_the_next_step_starts_another(tools):
    tools.reset([start()])
    with pytest.raises(RewardError, match="exit code 3"):
        act(tools, ToolCall(name="leave"))
    assert tools.reset([start()])[0] is not None


def test_a_stepped_environment_ends_by_none_or_by_its_flag(folder):
    with opened(folder, "Count", form="step") as process:
        assert process.description.tools == [] and not process.description.has_reward
        assert process.reset([start()]) == [None]

        def step(text):
            (reaction,) = process.act([Action(slot=0, text=text, calls=())])
            return reaction.texts, reaction.num_failed, reaction.is_over

        assert step("a") == (("1:a",), 0, False)
        assert step("bad") == (('{"error": "not that"}',), 1, False)
        assert step("over") == ((), 0, True)
        assert step("done") == ((), 0, True)


def test_the_gym_form_gives_the_chat_and_adds_up_rewards(folder):
    with opened(folder, "Gym", form="gym", args={"most": 2}) as process:
        (chat,) = process.reset([start(prompt="p")])
        assert chat == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "begin 10"},
        ]
        first, second = (process.act([Action(slot=0, text=t, calls=())])[0] for t in "ab")
        assert (first.texts, first.is_over) == (("left 1 of 3",), False)
        assert second.is_over
        assert process.rewards([0]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("NoReset", "tools", "has no method reset"),
        ("Untyped", "tools", "the public method add is a tool, and its schema"),
        ("Tools", "step", "has no method step"),
        ("Missing", "tools", "has no class or function 'Missing'"),
    ],
)
def test_a_class_of_another_form_is_refused_at_the_start(folder, name, form, message):
    with pytest.raises(RecipeError, match=message):
        opened(folder, name, form=form)


def test_a_failing_reset_stops_the_run_and_names_the_line(folder):
    expected = pytest.raises(RewardError, match=r"reset raised KeyError: 'gone' \(.*envs.py, line")
    with opened(folder, "Broken") as process, expected:
        process.reset([Start(slot=0, seed=1, row={})])


def test_each_call_into_user_code_begins_a_limit_of_its_own(tools, monkeypatch):
    heard = []
    receive = tools._child.receive
    monkeypatch.setattr(
        tools._child, "receive", lambda deadline: heard.append(receive(deadline)) or heard[-1]
    )
    tools.reset([start()])
    # The class, then reset.
    assert [event["event"] for event in heard] == ["started"] * 2 + ["done", "finished"]
    heard.clear()
    quick = ToolCall(name="slow", arguments={"seconds": 0.0})
    # Each async call, and its steps before and after its wait.
    act(tools, quick, ToolCall(name="missing"), quick, quick)
    assert [event["event"] for event in heard] == ["started"] * 9 + ["done", "finished"]


def test_an_alarm_of_user_code_does_not_switch_the_limit_off(folder):
    with opened(folder, "Deaf", timeout_s=2.0) as process:
        process.reset([Start(slot=0, seed=1, row={})])
        assert act(process, ToolCall(name="no_alarm")).num_failed == 0
        assert "still running after 2 s" in act(process, ToolCall(name="spin")).texts[0]


def test_conversations_of_one_seed_begin_with_instances_made_alike_in_every_step(folder):
    def played(process, seed):
        process.reset([start(slot, seed=seed) for slot in (0, 1)])
        reactions = process.act([Action(slot=slot, text="", calls=()) for slot in (0, 1)])
        return [reaction.texts[0] for reaction in reactions]

    with opened(folder, "Deck", form="step") as process:
        first, second = played(process, 5)
        assert first == second and first.startswith("1 ")
        other = played(process, 6)
        assert other[0] != first
    # A resumed run has another process, which has not seen the step before.
    with opened(folder, "Deck", form="step") as process:
        assert played(process, 6) == other


def test_a_gym_is_closed_before_its_successor_begins(folder):
    with opened(folder, "Closed", form="gym") as process:
        (before,), (after,) = (process.reset([start(prompt="p")]) for _ in range(2))
    assert (before[-1]["content"], after[-1]["content"]) == ("", "closed")


def test_deep_arguments_reach_a_tool(tools):
    tools.reset([start()])
    deep = []
    for _ in range(700):
        deep = [deep]
    # Beyond what a parser lets pass, so nothing on the way may recurse in Python.
    call = ToolCall(name="fail", arguments={"a": deep})
    assert act(tools, call).num_failed == 1
