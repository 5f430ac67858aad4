"""Origin: who recorded the rows of a trace, and under which weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpan:
    """Rows ``start:stop`` were routed by the weights of ``policy_version``."""

    start: int
    """First row, from the start of the trace that holds the span."""
    stop: int
    """One past the last row."""
    policy_version: int
    """Number of weight pushes that the recording model had received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who recorded a trace, and under which weights."""

    engine: str
    """Short name of the recorder, such as ``embedded`` or ``vllm``."""
    engine_version: str
    """Version of the recorder's library."""
    spans: tuple[PolicySpan, ...]
    """Contiguous, covering every row in order; several when a rollout crossed a weight push."""

    @classmethod
    def single(
        cls, *, engine: str, engine_version: str, policy_version: int, num_rows: int
    ) -> Origin:
        """Return an origin whose rows all come from one policy version."""
        span = PolicySpan(start=0, stop=num_rows, policy_version=policy_version)
        return cls(engine=engine, engine_version=engine_version, spans=(span,) if num_rows else ())

    def crop(self, start: int, stop: int) -> Origin:
        """Return the origin of the rows ``start:stop``, counted from ``start``."""
        cut = (
            (max(span.start, start), min(span.stop, stop), span.policy_version)
            for span in self.spans
        )
        spans = tuple(
            PolicySpan(start=a - start, stop=b - start, policy_version=version)
            for a, b, version in cut
            if a < b
        )
        return Origin(engine=self.engine, engine_version=self.engine_version, spans=spans)
