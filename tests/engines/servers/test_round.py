"""One round's work: what is counted meanwhile, and how many draws by other noise a run may have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_replay.engines.serve.messages import Progress
from moe_replay.engines.servers.contract import Ask
from moe_replay.engines.servers.faults import CallError, Fault
from moe_replay.engines.servers.round import Redraws, Round
from moe_replay.engines.types import RolloutProgress
from moe_replay.errors import EngineError

from ..server_case import POLICY, SAMPLING, fake, requests

URL = "http://a"


def asks(count: int) -> list[Ask]:
    description = fake().description
    return [
        Ask(
            request=request,
            numbers=range(request.num_generations),
            sampling=SAMPLING,
            policy=POLICY,
            description=description,
        )
        for request in requests(count)
    ]


def test_tokens_under_way_are_counted_until_they_come_back():
    (group,) = fake().generate(requests(1), SAMPLING)
    work = Round(asks(1), 2, {URL})
    task = work.take(URL)
    work.note(task, Progress(doing="sampling", num_tokens=3))
    assert work.progress() == RolloutProgress(num_finished=0, num_total=2, num_tokens=3)
    work.keep(task, URL, 1, group.completions[1])
    work.give_back(task, URL, CallError(Fault.FAILED, "a"))
    length = len(group.completions[1].token_ids)
    assert work.progress() == RolloutProgress(num_finished=1, num_total=2, num_tokens=length)
    again = work.take(URL)
    # Only what is missing is asked for again.
    assert again.numbers == (0,)
    work.keep(again, URL, 0, group.completions[0])
    work.finish(again, URL)
    assert work.take(URL) is None
    (result,) = work.results()
    assert [c.token_ids.tolist() for c in result.completions] == [
        c.token_ids.tolist() for c in group.completions
    ]


def test_threads_without_work_are_woken_by_a_failure_or_the_last_call_and_not_by_others():
    work = Round(asks(2), 3, {URL})
    tasks = [work.take(URL), work.take(URL)]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(work.take, URL)
        work.give_back(tasks[0], URL, CallError(Fault.FAILED, "a"))
        again = waiting.result()
        assert again.request.request_id == 0

        waiting = threads.submit(work.take, URL)
        for task in (again, tasks[1]):
            (group,) = fake().generate([task.request], SAMPLING)
            for number, completion in enumerate(group.completions):
                work.keep(task, URL, number, completion)
            assert not waiting.done()
            work.finish(task, URL)
        assert waiting.result() is None


def failed(work: Round, *messages: str) -> None:
    for message in messages:
        work.give_back(work.take(URL), URL, CallError(Fault.FAILED, message))


def test_what_a_server_failed_of_first_is_named_beside_what_came_of_it():
    work = Round(asks(1), 3, {URL})
    failed(work, "its engine has ended", "no connection", "no connection")
    with pytest.raises(EngineError, match=r"last: no connection; its .* of: its engine has ended;"):
        work.results()


def test_a_failure_before_the_last_success_of_a_server_is_not_its_cause():
    (group,) = fake().generate(requests(1), SAMPLING)
    work = Round(asks(2), 2, {URL})
    failed(work, "once")
    task = work.take(URL)
    for number in task.numbers:
        work.keep(task, URL, number, group.completions[number])
    work.finish(task, URL)
    failed(work, "twice")
    with pytest.raises(EngineError, match="last: twice; the run can") as caught:
        work.results()
    assert "once" not in str(caught.value)


def test_what_a_server_said_explains_that_it_cannot_be_reached_whatever_came_between():
    (group,) = fake().generate(requests(1), SAMPLING)
    work = Round(asks(3), 2, {URL})
    failed(work, "its engine has ended")
    task = work.take(URL)
    for number in task.numbers:
        work.keep(task, URL, number, group.completions[number])
    work.finish(task, URL)
    gone = CallError(Fault.UNREACHABLE, "no connection")
    while not work.is_stopped:
        work.give_back(work.take(URL), URL, gone)
    with pytest.raises(EngineError, match=r"no connection; its .* of: its engine has ended;"):
        work.results()


@pytest.mark.parametrize(("num_sampled", "allowed"), [(0, 8), (800, 8), (2000, 20)])
def test_e2_eight_redraws_or_one_percent_are_allowed(num_sampled, allowed):
    redraws = Redraws()
    for _ in range(allowed):
        error = CallError(Fault.CORRUPT, "damaged")
        assert redraws.add(error, num_missing=1, num_sampled=num_sampled, url=URL) is None
    stop = redraws.add(
        CallError(Fault.CUT, "no room"), num_missing=1, num_sampled=num_sampled, url=URL
    )
    assert f"corrupt {allowed}, cut 1" in str(stop) and "no room" in str(stop)
    assert redraws.count == allowed + 1


def test_e2_a_silence_of_a_server_counts_once_and_a_second_one_again():
    redraws = Redraws()
    for incident, url in [*[(1, URL)] * 100, (2, URL), (1, "http://b")]:
        error = CallError(Fault.SLOW, "silent", incident)
        assert redraws.add(error, num_missing=16, num_sampled=0, url=url) is None
    assert redraws.count == 3
