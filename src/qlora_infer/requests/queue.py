"""The queue of waiting requests, which chooses the next one by fair shares of the adapters.

Two resources are shared out. *Places* in the engine's batch (``max_num_seqs``) go to whichever adapter has been given
least. *Slots* on the device (``max_loras``) go round in turns, because an adapter cannot share one: it must be run
empty before the next one moves in. A turn is long enough to pay for the change, and short enough to wait for.

Tokens are counted as they come, prompt and generated alike, as in VTC (Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024); turns and debts follow deficit round robin (Shreedhar and Varghese, SIGCOMM 1995). VTC's
counters alone order adapters by what they have been given, and would change slots at every request; round robin keeps
an adapter's requests together, and its bound holds also against an endless stream of new names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal

from attrs import define, field

from qlora_infer.heap import Heap
from qlora_infer.requests.pending import PendingRequest

if TYPE_CHECKING:
    from qlora_infer.adapters.version import AdapterVersion

Policy = Literal["fair", "fcfs"]

#: Steps of the whole batch that an adapter is given in a turn, and steps that the turn lasts at most.
QUANTUM_STEPS = 64
TURN_STEPS = 128

#: Among so many adapters that wait for a slot, one that is in host memory goes first; each is overtaken so often at
#: most.
MAX_OVERTAKEN = 8


class RequestQueue:
    """Waiting requests in lanes, one for each adapter and one for the base model.

    Within a lane the lower ``priority`` goes first, then the older request. Between lanes:

    - The lower ``priority`` goes first, always: over fairness, and over the rest of another adapter's turn.
    - A free place goes to the lane that has most credit left. A lane's credit is what it has still to be given in
      this round: ``QUANTUM_STEPS * max_num_seqs`` tokens, times its adapter's share. What it takes beyond that, it
      owes to the rounds after.
    - A slot that becomes free goes to the lane that has waited longest for one. While some wait, an adapter that has
      used its credit, or has had its slot for ``TURN_STEPS`` steps times its share, takes no further requests, and
      leaves when those that run have finished. At most half the slots are emptied at a time; the other adapters keep
      the batch full.
    - The fewer adapters in a batch, the faster it is. So while more requests wait than a batch holds, and adapters
      whose turn it is can fill it, one that has many waiting is kept waiting for the end of a turn, even if a slot is
      free. One that has few takes the free slot at once.
    - The base model needs no slot.
    - A slot whose requests are about to end, and which no more wait for, is given to the next adapter already
      (``expect``): the engine is to have its requests by then. No other lane enters it any more.

    So a request whose adapter owes nothing starts within ``(n + 1) * (TURN_STEPS * w + L) + 2 L`` steps, whatever
    else comes in: ``n`` is the number of adapters that wait for a slot or hold one when it arrives, plus
    ``MAX_OVERTAKEN``; ``w`` the largest share, at least one; ``L`` the steps of the longest request.

    ``policy="fcfs"`` is one lane for all: the oldest request is next, and no request overtakes it while it has no slot.

    It is not locked; the driver is.

    Args:
        policy: ``"fair"`` or ``"fcfs"``.
        max_loras: The slots.
        max_num_seqs: The sequences of a batch; ``resize`` changes it.
        is_resident: Whether an adapter is in host memory, so that giving it a slot is quick.

    Attributes:
        max_loras: The slots.
        max_num_seqs: The sequences of a batch.
        num_places: The places, some more than that where the engine is to have the next ones already.
        num_running: The places taken.
    """

    def __init__(
        self,
        policy: Policy = "fair",
        *,
        max_loras: int,
        max_num_seqs: int = 1,
        is_resident: Callable[[AdapterVersion], bool] = lambda version: True,
    ) -> None:
        self._policy = policy
        self.max_loras = max_loras
        self._is_resident = is_resident
        self._numbers = itertools.count()
        self._lanes: dict[str | None, _Lane] = {}
        self._in_turn: dict[str | None, _Lane] = {}  # those that are admitted from
        self._line: Heap[_Lane] = Heap()  # those that wait for a slot
        self._few: Heap[_Lane] = Heap()  # of these, those that have few requests waiting
        self._in_slots: set[AdapterVersion] = set()  # those with running requests
        self._leaving: set[AdapterVersion] = set()  # of these, those whose slot is another's already
        self._ending: dict[AdapterVersion, int] = {}  # of how many of these the end is near
        self._most_leaving = 0
        self._turns_are_due = False  # whether a slot may have become free, or somebody may have lined up for one
        self._num_waiting = 0
        self._step = 0
        self._round = 0
        self.num_running = 0
        self.resize(max_num_seqs)

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_adapters_in_line(self) -> int:
        """Adapters that wait for a slot."""
        return len(self._line)

    def resize(self, max_num_seqs: int) -> None:
        """Set the size of a batch, and as many places."""
        self.max_num_seqs = self.num_places = max_num_seqs
        self._quantum = float(QUANTUM_STEPS * max_num_seqs)

    def append(self, pending: PendingRequest) -> None:
        """Add a request; one that ran and is to run again goes back to where it was."""
        if pending.number is None:
            pending.number = next(self._numbers)
        lane = self._lane_of(pending)
        if lane.is_idle:
            self._welcome_back(lane)
        lane.share = pending.request.share
        lane.waiting.push((pending.request.priority, pending.number), pending)
        self._num_waiting += 1
        self._line_up(lane, is_new=True)

    def remove(self, pending: PendingRequest) -> bool:
        """Take a request out; whether it was waiting."""
        lane = self._lanes.get(self._key(pending))
        if lane is None or not lane.waiting.remove(pending):
            return False
        self._num_waiting -= 1
        self._settle(lane)
        return True

    def admit(self) -> PendingRequest | None:
        """Take out the request that starts next, which takes a place and its adapter's slot until ``leave``.

        ``None`` when every place is taken, or nothing that waits has a slot to run in.
        """
        if not self._num_waiting or self.num_running >= self.num_places:
            return None
        if self._turns_are_due:
            self._turns_are_due = False
            self._begin_turns()
        ready = [lane for lane in self._in_turn.values() if self._fits(lane)]
        if not ready:
            return None
        lane = min(ready, key=_Lane.rank)
        if lane.credit <= 0:
            self._forgive(lane)
        pending = lane.waiting.pop()
        version = pending.request.adapter
        if version is not None:
            version.num_running += 1
            self._in_slots.add(version)
            self._ending.pop(version, None)
        lane.num_running += 1
        self.num_running += pending.num_seqs
        self._num_waiting -= 1
        self._turns_are_due |= not lane.waiting
        return pending

    def charge(self, pending: PendingRequest, num_tokens: int) -> None:
        """Count tokens that a running request was given."""
        lane = self._lane_of(pending)
        lane.credit -= num_tokens / lane.share

    def leave(self, pending: PendingRequest) -> None:
        """Give back the place of a request that runs no more, and the slot of the last one of its adapter."""
        lane = self._lane_of(pending)
        lane.num_running -= 1
        self.num_running -= pending.num_seqs
        version = pending.request.adapter
        if version is not None:
            version.num_running -= 1
            if not version.num_running:
                self._in_slots.discard(version)
                self._leaving.discard(version)
        self._settle(lane)

    def expect(self, ending: Mapping[AdapterVersion, int], *, at_most: int) -> None:
        """Begin the next adapters where all running requests of another are about to end.

        Args:
            ending: How many of an adapter's running requests end within a few steps; it holds until it is told anew.
            at_most: The number of adapters that can have a slot that another has not left.
        """
        self._ending, self._most_leaving = dict(ending), at_most

    def count_step(self) -> None:
        """Count a step of the engine."""
        self._step += 1
        self._turns_are_due = True

    def upcoming(self, number: int) -> list[AdapterVersion]:
        """Return the adapters that get the next slots, the next one first."""
        blocked = [lane for lane in self._in_turn.values() if lane.waiting and not self._fits(lane)]
        lanes = [*blocked, *self._line.first(number)][:number]
        return [lane.next_version for lane in lanes if lane.next_version is not None]

    def forget(self, name: str) -> None:
        """Drop the records of an unloaded adapter, once it has no requests."""
        lane = self._lanes.get(name)
        if lane is not None and lane.is_idle:
            del self._lanes[name]

    def drain(self) -> list[PendingRequest]:
        """Take out everything that waits, the oldest first."""
        waiting = []
        for lane in self._lanes.values():
            waiting += list(lane.waiting)
            lane.waiting = Heap()
            self._settle(lane)
        self._num_waiting = 0
        return sorted(waiting, key=lambda pending: pending.number or 0)

    # Turns ------------------------------------------------------------------------------------------------------

    def _key(self, pending: PendingRequest) -> str | None:
        return pending.request.adapter_name if self._policy == "fair" else None

    def _lane_of(self, pending: PendingRequest) -> _Lane:
        key = self._key(pending)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
        return lane

    def _line_up(self, lane: _Lane, *, is_new: bool = False) -> None:
        """Put a lane with waiting requests among those in turn, or in line for a slot."""
        if lane.key in self._in_turn:
            return
        if lane.key is None:  # the base model, or everybody under "fcfs"
            self._in_turn[None] = lane
            return
        if lane not in self._line:
            # One that has work all along is due in its next round, even if others have got ahead; one that comes new
            # is due after all that wait already.
            lane.round = max(lane.round + 1, self._round + is_new)
            lane.number_in_line = next(self._numbers)
        self._place_in_line(lane)
        self._turns_are_due = True

    def _place_in_line(self, lane: _Lane) -> None:
        place = (lane.priority, lane.round, lane.number_in_line)
        self._line.push(place, lane)
        if self._has_few(lane):
            self._few.push(place, lane)
        else:
            self._few.remove(lane)

    def _leave_line(self, lane: _Lane) -> None:
        self._line.remove(lane)
        self._few.remove(lane)

    def _settle(self, lane: _Lane) -> None:
        """Drop a lane's unused records, after a request has gone."""
        self._turns_are_due = True
        if lane.waiting:
            self._line_up(lane)
            return
        self._leave_line(lane)
        if not lane.num_running:
            self._in_turn.pop(lane.key, None)

    def _begin_turns(self) -> None:
        """Give free slots to the lanes that have waited longest for one, and see to it that slots become free."""
        while self._line:
            lane = self._line.head()
            if self._num_slots_spoken_for() >= self.max_loras:
                if lane.next_version not in self._staying:
                    if self._end_turns(lane.priority) or self._begin_leaving():
                        continue
                    return
            elif not self._is_better_without(lane):
                lane = self._resident_one(lane)
            elif self._few and self._few.head().priority <= lane.priority:
                lane = self._few.head()
            elif not self._end_turns(lane.priority, any_number=True):
                return
            else:
                continue
            self._leave_line(lane)
            self._reach_round(lane.round)
            self._renew(lane)
            if lane.credit > 0:
                lane.turn_began, lane.num_overtaken = self._step, 0
                self._in_turn[lane.key] = lane
            else:
                self._line_up(lane)  # it owes this round to the others
                self._skip_rounds()

    def _is_better_without(self, lane: _Lane) -> bool:
        """Return whether those in turn keep the batch full, with fewer adapters, so that a free slot stays free."""
        if self._num_waiting < self.max_num_seqs or self._has_few(lane):
            return False
        return any(
            other.key is not None and self._fits(other) and other.priority <= lane.priority
            for other in self._in_turn.values()
        )

    def _has_few(self, lane: _Lane) -> bool:
        return len(lane.waiting) <= max(1.0, self.max_num_seqs / self.max_loras / 4)

    @property
    def _staying(self) -> AbstractSet[AdapterVersion]:
        """The adapters in slots that are not another's already."""
        return self._in_slots - self._leaving

    def _num_slots_spoken_for(self) -> int:
        meant = {lane.next_version for lane in self._in_turn.values()} - {None}
        return len(meant | self._staying)

    def _resident_one(self, first: _Lane) -> _Lane:
        """Return the first in line, or a later one whose adapter is in host memory while that of the first is not."""
        if self._is_ready(first) or first.num_overtaken >= MAX_OVERTAKEN:
            return first
        for lane in self._line.first(MAX_OVERTAKEN)[1:]:
            if lane.priority == first.priority and self._is_ready(lane):
                first.num_overtaken += 1
                return lane
        return first

    def _is_ready(self, lane: _Lane) -> bool:
        return lane.next_version is None or self._is_resident(lane.next_version)

    def _end_turns(self, priority: int, *, any_number: bool = False) -> bool:
        """Stop admitting to lanes that have had their turn, for those in line; return whether one can begin now."""
        num_emptying = sum(version.name not in self._in_turn for version in self._staying)
        num_wanted = min(max(1, self.max_loras // 2), len(self._line)) - num_emptying
        if any_number:
            num_wanted = len(self._in_turn)
        done = [lane for lane in self._in_turn.values() if self._has_had_its_turn(lane, priority)]
        # The quickest to empty first, as far as one can tell.
        ending = sorted(done, key=lambda lane: (bool(lane.waiting), lane.num_running))[: max(0, num_wanted)]
        for lane in ending:
            del self._in_turn[lane.key]
            self._settle(lane)
        return bool(ending) if any_number else any(not lane.num_running for lane in ending)

    def _begin_leaving(self) -> bool:
        """Release one adapter whose last requests are about to end; return whether there is one."""
        if len(self._leaving) >= self._most_leaving:
            return False
        for version, num_ending in self._ending.items():
            if version in self._leaving or num_ending != version.num_running:
                continue
            lane = self._in_turn.get(version.name)
            if lane is not None and not lane.waiting:
                del self._in_turn[version.name]
            elif lane is not None and lane.next_version == version:
                continue
            self._leaving.add(version)
            return True
        return False

    def _has_had_its_turn(self, lane: _Lane, priority: int) -> bool:
        if lane.key is None:
            return False
        if lane.waiting and lane.priority != priority:
            return lane.priority > priority
        return lane.credit <= 0 or self._step - lane.turn_began >= TURN_STEPS * max(1.0, lane.share)

    def _fits(self, lane: _Lane) -> bool:
        if not lane.waiting:
            return False
        version = lane.next_version
        if version is None or version in self._in_slots:
            return version not in self._leaving
        return len(self._in_slots) - len(self._leaving) < self.max_loras

    # Credit -----------------------------------------------------------------------------------------------------

    def _renew(self, lane: _Lane, rounds: int = 1) -> None:
        """Give a lane its credit of a round; unused credit is not saved."""
        lane.credit = min(self._quantum, lane.credit + self._quantum * rounds)

    def _skip_rounds(self) -> None:
        """Skip the rounds in which every lane in line would only pay off debt."""
        if any(lane.credit > -self._quantum for lane in self._line):
            return
        rounds = min(int(-lane.credit // self._quantum) for lane in self._line)
        for lane in list(self._line):
            self._renew(lane, rounds)
            lane.round += rounds
            self._place_in_line(lane)

    def _reach_round(self, round_: int) -> None:
        """Count the rounds, for the base model too, which waits for no turn."""
        base = self._lanes.get(None)
        if base is not None and round_ > self._round:
            self._renew(base, round_ - self._round)
        self._round = max(self._round, round_)

    def _forgive(self, lane: _Lane) -> None:
        """Give a place to a lane without credit, because no lane with credit can use it."""
        if not self._line:
            for in_turn in self._in_turn.values():
                self._renew(in_turn)
        elif lane.key is None:
            # Those in line wait for a slot and not for this place, which the base model costs them not.
            lane.credit = 0.0

    def _welcome_back(self, lane: _Lane) -> None:
        """Subtract the past rounds from an old debt, or all of it while no lane waits."""
        if not self._num_waiting:
            lane.credit = self._quantum if lane.key is None else 0.0
        elif lane.key is not None:
            lane.credit = min(0.0, lane.credit + self._quantum * max(0, self._round - lane.round))


@define(eq=False)
class _Lane:
    """The waiting requests of one adapter, and its consumption."""

    key: str | None
    credit: float = 0.0
    share: float = 1.0
    waiting: Heap[PendingRequest] = field(factory=Heap)
    num_running: int = 0
    turn_began: int = 0
    round: int = 0
    number_in_line: int = 0
    num_overtaken: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.num_running

    @property
    def priority(self) -> int:
        return self.waiting.head().request.priority

    @property
    def next_version(self) -> AdapterVersion | None:
        return self.waiting.head().request.adapter if self.waiting else None

    def rank(self) -> tuple[int, float, int]:
        """Return the order among lanes in turn: urgency, then credit, then age."""
        pending = self.waiting.head()
        return pending.request.priority, -self.credit, pending.number or 0
