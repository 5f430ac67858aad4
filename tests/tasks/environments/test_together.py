"""Async tools of a wave wait together, each within its limit; plain functions are tools too."""

import pytest

from moe_replay.errors import RecipeError
from moe_replay.recipe.sections.environment import EnvironmentSection
from moe_replay.tasks.environments.client import Action, EnvironmentProcess, Start
from moe_replay.tasks.environments.tool_calls import ToolCall

CODE = '''
import asyncio, time

class Meeting:
    # Tools that return once others have come: one after the other they would wait for ever.
    here = 0
    most = 0

    def reset(self): ...

    async def meet(self, count: int):
        """Wait for others.

        Args:
            count: how many
        """
        Meeting.here += 1
        Meeting.most = max(Meeting.most, Meeting.here)
        while Meeting.most < count:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        Meeting.here -= 1
        return f"met {count}"

    async def most_at_once(self):
        """Tell."""
        return Meeting.most

    async def stuck(self):
        """Never return, without waiting."""
        while True:
            pass

    async def leaves(self):
        """Exit."""
        raise SystemExit

    async def blocks(self):
        """Hold up the others, in tasks of its own and after a wait."""
        await asyncio.gather(asyncio.sleep(0, time.sleep(0.05)), self._part(), self._part())
        time.sleep(0.05)
        return "ok"

    async def _part(self):
        await asyncio.sleep(0.001)
        time.sleep(0.05)

    async def get_reward(self):
        await self.meet(1)
        return 1.0

def double(number: int) -> int:
    """Double a number.

    Args:
        number: any
    """
    return 2 * number

def unclear(number):
    """Say nothing of its argument."""

class Adder:
    def reset(self, *, start_at):
        self.total = start_at

    def add(self, a: int):
        """Add to the total.

        Args:
            a: what to add
        """
        self.total += a
        return self.total
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("environments")
    (path / "envs.py").write_text(CODE)
    return path


def opened(folder, name, **keys) -> EnvironmentProcess:
    section = EnvironmentSection(factory=f"{folder}/envs.py:{name}", **keys)
    return EnvironmentProcess(section)


def act(process, *calls: ToolCall):
    (reaction,) = process.act([Action(slot=0, text="", calls=calls)])
    return reaction


def many(process, *calls: ToolCall):
    """Let one conversation make each call, all in one wave."""
    process.reset([Start(slot=slot, seed=1, row={}) for slot in range(len(calls))])
    return process.act([Action(slot=n, text="", calls=[call]) for n, call in enumerate(calls)])


def meet(count: int) -> ToolCall:
    return ToolCall(name="meet", arguments={"count": count})


def test_async_tools_of_a_wave_wait_together_up_to_a_bound(folder):
    with opened(folder, "Meeting", timeout_s=300.0) as process:
        reactions = many(process, *[meet(5)] * 5)
        assert [reaction.texts for reaction in reactions] == [("met 5",)] * 5
        assert process.rewards(range(5)).tolist() == [1.0] * 5
    with opened(folder, "Meeting", timeout_s=300.0, max_concurrent_calls=2) as process:
        assert all(not reaction.num_failed for reaction in many(process, *[meet(2)] * 6))
        assert act(process, ToolCall(name="most_at_once")).texts == ("2",)


def test_a_late_tool_among_others_is_late_alone(folder):
    with opened(folder, "Meeting", timeout_s=2.0) as process:
        names = ("most_at_once", "stuck", "leaves", "most_at_once")
        calls = [ToolCall(name=name) for name in names]
        # One that waits for ever, one that never waits, and one that ends the loop.
        reactions = many(process, meet(99), *calls[2:], calls[1])
        said = [reaction.texts[0] for reaction in reactions]
        assert "still running after 2 s" in said[0] and "still running after 2 s" in said[3]
        assert said[1] == '{"error": "SystemExit"}' and not reactions[2].num_failed
        # The process goes on.
        assert many(process, meet(1))[0].texts == ("met 1",)


def test_async_tools_that_block_for_less_than_their_limit_are_no_failure(folder):
    # 40 calls of 0.2 s hold each other up for 8 s in few turns of the loop: more than the limit of
    # one, and than the trainer waits for an event.
    with opened(folder, "Meeting", timeout_s=1.5) as process:
        calls = [ToolCall(name="blocks")] * 39
        reactions = many(process, *calls, ToolCall(name="stuck"))
        assert [reaction.texts for reaction in reactions[:39]] == [("ok",)] * 39
        # The control: one that takes longer by itself, with waits or without.
        assert "still running after 1.5 s" in reactions[39].texts[0]
        *_, late = many(process, ToolCall(name="blocks"), meet(99))
        assert "still running after 1.5 s" in late.texts[0]


def test_plain_functions_are_tools_beside_a_class_or_alone(folder):
    function = f"{folder}/envs.py:double"
    call = ToolCall(name="double", arguments={"number": 21})
    with EnvironmentProcess(EnvironmentSection(tools=(function,))) as process:
        (schema,) = process.description.tools
        assert schema["function"]["parameters"]["required"] == ["number"]
        assert not process.description.has_reward and process.description.takes == []
        assert process.reset([Start(slot=0, seed=1, row={"start_at": 10})]) == [None]
        assert act(process, call).texts == ("42",)
        wrong = act(process, ToolCall(name="reset"))
        assert "the tools are double" in wrong.texts[0]
    with opened(folder, "Adder", tools=(function,)) as process:
        names = [tool["function"]["name"] for tool in process.description.tools]
        assert names == ["add", "double"]
        process.reset([Start(slot=0, seed=1, row={"start_at": 10})])
        assert act(process, call, ToolCall(name="add", arguments={"a": 1})).texts == ("42", "11")
    for tools, message in (
        ((function, function), "two tools are called 'double'"),
        ((f"{folder}/envs.py:unclear",), "environment.tools: unclear is a tool, and its schema"),
        (("double",), "environment.tools 'double' is not of the form file.py:function"),
    ):
        with pytest.raises(RecipeError, match=message):
            EnvironmentProcess(EnvironmentSection(tools=tools))
