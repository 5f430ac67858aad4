"""Agreement of live and replayed routes over one pass: what the guard checks, and what the metrics report.

In: watched rows of each microbatch. Out: Agreement, flips and collapsed layers of the pass, or MisalignmentError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from moe_replay.batch import Microbatch
from moe_replay.grpo.collapse import LiveSets
from moe_replay.grpo.metrics import Tally
from moe_replay.routing import Agreement, Guard, GuardEvidence, measure_agreement
from moe_replay.sync.messages import HostGroup


class AgreementWatch:
    """Receives the evidence of one pass, microbatch by microbatch; hand its `observe` to `RouteWatch`."""

    def __init__(
        self,
        guard: Guard | None,
        *,
        num_experts: int,
        where: str,
        on_collapse: Callable[[Sequence[int]], None],
    ) -> None:
        """Measure the pass called ``where``, and let ``guard`` judge it if there is one.

        ``on_collapse`` is told of layers that send every token of all ranks to the same experts.
        """
        self._on_collapse = on_collapse
        self._guard = guard
        self._num_experts = num_experts
        self._where = where
        self._parts: list[Agreement] = []
        self._flips = Tally()
        self._live_sets = LiveSets()

    def observe(
        self,
        microbatch: Microbatch,
        rows: Int64[np.ndarray, " watched"],
        live_ids: Integer[np.ndarray, "watched layers topk"],
        layers: Sequence[int],
    ) -> None:
        """Take the live experts of ``rows``.

        Raises:
            MisalignmentError: when the guard finds that the routes cannot belong to these rows.
        """
        routes = microbatch.routes
        assert routes is not None
        place = [routes.layers.index(layer) for layer in layers]
        evidence = GuardEvidence(
            live_ids=live_ids,
            rows=rows,
            expert_ids=routes.expert_ids[place].transpose(1, 0, 2),
            valid=routes.valid,
            sample=microbatch.sample_ids[microbatch.router_rows],
            position=microbatch.positions[microbatch.router_rows],
            layers=tuple(layers),
        )
        where = f"{self._where}, microbatch {microbatch.key}"
        if self._guard is not None:
            self._parts.append(self._guard.check(evidence, where=where))
        else:
            self._parts.append(measure_agreement(evidence, num_experts=self._num_experts))
        replayed = evidence.expert_ids[rows]
        flipped = (np.sort(replayed, axis=2) != np.sort(live_ids, axis=2)).any(axis=2)
        self._flips.add_mean(
            "replay/tokens_with_flip_frac", total=int(flipped.any(axis=1).sum()), count=len(rows)
        )
        self._flips.add_mean("replay/flip_frac", total=int(flipped.sum()), count=int(flipped.size))
        self._live_sets.add(live_ids, microbatch.token_ids[microbatch.router_rows][rows], layers)

    def metrics(self, ranks: HostGroup) -> dict[str, float]:
        """Return the ``replay/*`` metrics of the pass over all ``ranks``; empty when nothing was watched."""
        own = Agreement.total(self._parts)
        message = {
            "layers": list(own.layers),
            "num_rows": own.num_rows.tolist(),
            "slot_overlap": own.slot_overlap.tolist(),
            "equal_sets": own.equal_sets.tolist(),
            "chance": own.chance.tolist(),
            "flips": self._flips.to_plain(),
            "live_sets": self._live_sets.to_plain(),
        }
        gathered = ranks.gather(message)
        whole = Agreement.total(
            Agreement(
                layers=tuple(part["layers"]),
                num_rows=np.array(part["num_rows"], dtype=np.int64),
                slot_overlap=np.array(part["slot_overlap"], dtype=np.float64),
                equal_sets=np.array(part["equal_sets"], dtype=np.float64),
                chance=np.array(part["chance"], dtype=np.float64),
            )
            for part in gathered
        )
        if not whole.num_rows.sum():
            return {}
        collapsed = LiveSets.collapsed([part["live_sets"] for part in gathered])
        if collapsed:
            self._on_collapse(collapsed)
        flips = Tally.merge([Tally.from_plain(part["flips"]) for part in gathered])
        return {
            "replay/agreement": whole.mean_slot_overlap,
            "replay/agreement_min_layer": float(whole.slot_overlap.min()),
            "replay/collapsed_layers": float(len(collapsed)),
            **flips.finish(),
        }
