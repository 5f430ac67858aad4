"""A worker of vLLM that tests can make fail; vLLM's processes import it by this name."""

from moe_replay.engines.vllm.workers import PushWorker, answered


class FaultyWorker(PushWorker):
    """Counts what it holds, and fails in a load when it was told to."""

    @answered
    def replay_plant(self, rank: int, after: int, times: int) -> None:
        """Have the next ``times`` loads of one rank raise after so many tensors."""
        self._moe_replay_planted = (rank, after, times)

    @answered
    def replay_leave_torn(self, wanted: bool) -> None:
        """Leave reloads that break off as vLLM leaves them."""
        self._moe_replay_leave_torn = wanted

    def _replay_finish(self):
        if not getattr(self, "_moe_replay_leave_torn", False):
            super()._replay_finish()

    @answered
    def replay_num_requests(self) -> int:
        return len(self.model_runner.requests)

    def _replay_load(self, tensors):
        rank, after, times = getattr(self, "_moe_replay_planted", (-1, 0, 0))
        if rank == self.rank and times:
            self._moe_replay_planted = (rank, after, times - 1)
            tensors = breaking_off(tensors, after)
        super()._replay_load(tensors)


def breaking_off(tensors, after):
    for number, named in enumerate(tensors):
        if number == after:
            raise RuntimeError("planted")
        yield named
