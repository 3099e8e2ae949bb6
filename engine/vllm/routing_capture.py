"""The requests that ask which experts their tokens got, and the rows of a step that are theirs.

A request says so in its sampling parameters (`ASKED` in `extra_args`), which reach every worker.
What its routers choose stays here, by position, until the API side takes it: between two steps, for
the tokens that it knows to be accepted. So neither drafts that were rejected nor tokens that were
computed twice need care.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from molehill.engine.routing_stats import TOKEN_IDS, Costs
from molehill.engine.vllm.chosen_experts import ChosenExperts, RouterTable
from molehill.engine.vllm.protocol import (
    ForgetRoutesRequest,
    Routes,
    RoutesReply,
    RoutesRequest,
    RoutingUsage,
)
from molehill.engine.vllm.step_following import computed_tokens, follow_steps
from molehill.kernels.interface import UNSERVED, Backend, Run
from molehill.kernels.routed_site import RoutedSite

logger = init_logger("vllm.molehill")

# In a request's `extra_args`: {"key": str, "tokens": int, "weights": bool, "n": int}.
ASKED = "molehill_routing"


@dataclass
class _Request:
    """key: by which the API side asks. index: among the samples of one prompt. chosen: once its
    adapter is in a slot."""

    key: str
    index: int
    lora_id: int
    tokens: int
    weighted: bool
    chosen: ChosenExperts | None = None


@dataclass(frozen=True)
class _Block:
    """Neighbouring rows of a step. first: the first of them among the captured ones."""

    chosen: ChosenExperts
    position: int
    first: int
    count: int


class RoutingCapture:
    """Of one worker. Costs a step without such requests nothing but a look at its new requests."""

    def __init__(
        self,
        runner: Any,
        backend: Backend,
        slot: Callable[[int], int | None],
        members: Callable[[int], Sequence[int]] = lambda slot: (),
    ) -> None:
        """runner: vLLM's model runner. slot: of an adapter's id, None where it is in none. members:
        the slots of an adapter by token's adapters, by its own slot."""
        self._backend = backend
        self._slot = slot
        self._members = members
        self._running: dict[str, _Request] = {}
        self._kept: dict[str, dict[int, _Request]] = {}
        self._tables: dict[int, RouterTable] = {}
        self._computed: dict[str, int] = {}
        self._layout: list[tuple[str, int]] = []
        self._blocks: list[_Block] = []
        follow_steps(runner, self)

    # Steps

    def follow(self, step: Any) -> None:
        """StepFollower.follow."""
        for request_id in step.finished_req_ids:
            self._running.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            request = _asking(new)
            # One that was preempted comes again as a new one, to vLLM's second model runner.
            if request is not None and new.req_id not in self._running:
                self._running[new.req_id] = request
                self._kept.setdefault(request.key, {})[request.index] = request
        self._layout = []
        self._computed = computed_tokens(step) if self._running else {}

    def lay_out(self, request_ids: Sequence[str], num_tokens: Sequence[int]) -> None:
        """StepFollower.lay_out."""
        if self._running:
            self._layout = list(zip(request_ids, map(int, num_tokens), strict=False))

    def begin_step(self, runs: Sequence[Run]) -> None:
        """After the backend's: `runs` are the step's that it was given. Never raises.

        What waits for ids of tokens is announced as unserved, and once more as the model is called:
        that counts.
        """
        if runs and all(run.slot == UNSERVED for run in runs):
            return
        layout, self._layout = self._layout, []
        rows: list[int] = []
        start = 0
        for request_id, size in layout:
            request = self._running.get(request_id)
            if request is not None:
                position = self._computed.get(request_id, 0)
                rows += self._take_rows(request, runs, range(start, start + size), position, rows)
            start += size
        if rows:
            self._backend.capture(rows)

    def _take_rows(
        self, request: _Request, runs: Sequence[Run], rows: range, position: int, before: list[int]
    ) -> list[int]:
        """Those of a request that its adapter acts on. position: of its first token in the step.
        before: what is captured of the step already."""
        slot = self._slot(request.lora_id)
        if slot is None:
            return []
        if request.chosen is None:
            table = self._table(request.lora_id, slot)
            request.chosen = ChosenExperts(table, request.tokens, request.weighted)
        request.chosen.extend(position + len(rows))
        members = self._members(slot)
        if members:
            request.chosen.put_dealt(position, members, runs, rows)
            return []
        taken: list[int] = []
        for run in runs:
            there = range(max(run.start, rows.start), min(run.stop, rows.stop))
            if run.slot == slot and there:
                place = position + there.start - rows.start
                first = len(before) + len(taken)
                self._blocks.append(_Block(request.chosen, place, first, len(there)))
                taken += there
        return taken

    def _table(self, lora_id: int, slot: int) -> RouterTable:
        if lora_id not in self._tables:
            members = len(self._members(slot))
            by_token = (RoutedSite(TOKEN_IDS, members, 1, 1, 0),) if members else ()
            self._tables[lora_id] = RouterTable(by_token or self._backend.routed_sites(slot))
        return self._tables[lora_id]

    def collect(self) -> None:
        """What the last step chose goes to its requests; before the next is announced, and before a
        slot is erased."""
        blocks, self._blocks = self._blocks, []
        if not blocks:
            return
        captured = self._backend.captured().cpu()
        for table, of_table in _by_table(blocks):
            rows = [row for b in of_table for row in range(b.first, b.first + b.count)]
            experts, weights = table.encode(captured[torch.tensor(rows)])
            row = 0
            for block in of_table:
                there = slice(row, row + block.count)
                block.chosen.put(block.position, experts[there], weights[there])
                row += block.count

    def leave_slot(self, lora_id: int) -> None:
        """The adapter's slot is about to be erased."""
        self.collect()
        self._tables.pop(lora_id, None)

    # What the API side asks

    def take(
        self, asked: RoutesRequest, stage: int, costs: Callable[[int], Costs | None]
    ) -> RoutesReply:
        """stage: this worker's of the pipeline. costs: of an adapter, by its id."""
        self.collect()
        kept = self._kept.get(asked.key, {})
        parts: list[Routes] = []
        table: RouterTable | None = None
        usage = RoutingUsage()
        for part in asked.parts:
            request = kept.get(part.index)
            if request is None or request.chosen is None:
                continue
            table = request.chosen.table
            there = slice(part.start, min(part.stop, request.chosen.size))
            experts, weights = request.chosen.experts[there], request.chosen.weights[there]
            parts.append(Routes(part.index, experts.tobytes(), weights.tobytes()))
            if asked.usage:
                usage += _usage(request.chosen, part.stop, costs(request.lora_id))
        if asked.forget:
            self._forget(asked.key)
        routers = () if table is None else table.routers
        most = 0 if table is None else table.most
        return RoutesReply(stage, routers, most, parts, usage)

    def forget(self, asked: ForgetRoutesRequest) -> None:
        """Nobody will ask again."""
        self._forget(asked.key)

    def _forget(self, key: str) -> None:
        for request in self._kept.pop(key, {}).values():
            for request_id, running in list(self._running.items()):
                if running is request:
                    del self._running[request_id]


def _asking(new: Any) -> _Request | None:
    """new: vLLM's NewRequestData. None if it does not ask."""
    arguments = getattr(new.sampling_params, "extra_args", None)
    asked = None if not arguments else arguments.get(ASKED)
    if asked is None or new.lora_request is None:
        return None
    lora_id = new.lora_request.lora_int_id
    try:
        # Samples of one prompt are requests of their own, whose ids begin with their number.
        index = int(new.req_id.partition("_")[0]) if asked["n"] > 1 else 0
        return _Request(asked["key"], index, lora_id, asked["tokens"], asked["weights"])
    except (KeyError, TypeError, ValueError):
        logger.error("molehill: request %s asks for its routing in no known way", new.req_id)
        return None


def _by_table(blocks: Sequence[_Block]) -> Iterator[tuple[RouterTable, list[_Block]]]:
    tables: dict[int, tuple[RouterTable, list[_Block]]] = {}
    for block in blocks:
        table = block.chosen.table
        tables.setdefault(id(table), (table, []))[1].append(block)
    yield from tables.values()


def _usage(chosen: ChosenExperts, stop: int, costs: Costs | None) -> RoutingUsage:
    """Of all tokens up to `stop`."""
    acted = int(chosen.acted[:stop].sum())
    if costs is None:
        return RoutingUsage(acted)
    routers = chosen.table.routers
    widest = max((len(costs.sites[site].experts) for site, _ in routers), default=0)
    counts = chosen.expert_counts(stop, widest)
    flops = acted * costs.static
    for (site, _), row in zip(routers, counts.tolist(), strict=True):
        cost = costs.sites[site]
        flops += sum(n * price for n, price in zip(row, cost.experts, strict=False))
        flops += acted * (cost.router or 0)
    return RoutingUsage(acted, acted * len(routers), int(counts.sum()), flops)
