"""What waits, in fair order: service classes by weight, tenants by virtual time, then priority, then arrival.

Start-time fair queueing (Goyal et al., SIGCOMM 1996) twice: between the service classes and, inside each, between
tenants. Whoever is served advances in virtual time by the request's tokens over its weight, so no class and no tenant
starves; who comes back from idle starts at the present, which is the start tag of the latest service, and saves up
nothing. `pop` only looks; `charge` is the service: what is put back has cost nothing.

Within a tenant, requests lie in *lanes* by the set of modes that may serve them: a request that only a busy mode may
serve never hides one that an idle mode could take. Removal is lazy: an entry that no longer waits is dropped when it
surfaces, and a lane is rebuilt when most of it is dead. Operations are O(log n); a pop also steps over the tenants that
no free mode may serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from msd.core.entry import YIELDING, Entry, Phase
from msd.domain import SERVICE_CLASSES, ServiceClass

_DEAD_ALLOWED = 64
_LAG_MOST = 65_536.0
"""Virtual time (tokens at weight 1) that one who waited for a busy mode may be ahead of the others: a long backlog for
a mode that was down must not buy every slot of the other modes for as long."""
Item = tuple[int, int, Entry]
Kind = tuple[int, int]
"""Bit set of eligible modes, and the mode parked for (-1: none; YIELDING: it lets others go first)."""


def _serves(kind: Kind, free: int, up: int, yielding: bool) -> bool:
    """Whether a mode in `free` may take a request of this kind. Parking ends while the mode is down."""
    eligible, parked = kind
    if (parked == YIELDING) is not yielding:
        return False
    if parked >= 0 and up >> parked & 1:
        return bool(free >> parked & 1)
    return bool(eligible & free)


class _Lane:
    """Requests of one tenant of one kind; a heap of (priority, seq, entry)."""

    __slots__ = ("heap", "kind", "live")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.heap: list[Item] = []
        self.live = 0

    def head(self) -> Item | None:
        """The first entry that still waits here; drops the dead before it."""
        heap = self.heap
        while heap:
            if heap[0][2].phase is Phase.WAITING:
                return heap[0]
            heappop(heap)
        return None

    def compact(self) -> None:
        """Drop the dead when they are most of the heap."""
        if len(self.heap) > 2 * self.live + _DEAD_ALLOWED:
            self.heap = [item for item in self.heap if item[2].phase is Phase.WAITING]
            heapify(self.heap)


class _Tenant:
    __slots__ = ("lanes", "live", "queued", "virtual_time", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.virtual_time = 0.0
        self.lanes: dict[Kind, _Lane] = {}
        self.live = 0
        self.queued = False


class _Class:
    __slots__ = ("kinds", "live", "order", "present", "tenants", "virtual_time", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.virtual_time = 0.0
        self.live = 0
        self.tenants: dict[str, _Tenant] = {}
        self.kinds: dict[Kind, int] = {}
        """How many wait of each kind: one look tells that a free mode can serve nobody here."""
        self.present = 0.0
        """Start tag of the latest service among the tenants."""
        self.order: list[tuple[float, str]] = []
        """Heap of the tenants by virtual time, each once. A tag may be too early: mended when it surfaces."""


class FairQueue:
    """The waiting requests. The scheduler changes `entry.phase`; the queue keeps order and counts."""

    def __init__(self, class_weights: Mapping[ServiceClass, int], tenant_weights: Mapping[str, int]) -> None:
        self._classes = {name: _Class(class_weights.get(name, 1)) for name in SERVICE_CLASSES}
        self._all = tuple(self._classes.values())
        self._tenant_weights = tenant_weights
        self._present = 0.0
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting

    def push(self, entry: Entry) -> None:
        """Add an entry in phase WAITING (or put a parked or retried one back at its old place, by `seq`)."""
        request = entry.request
        cls = self._classes[request.service_class]
        tenant = cls.tenants.get(request.tenant)
        if tenant is None:
            if len(cls.tenants) > 2 * cls.live + _DEAD_ALLOWED:
                _forget_idle(cls)
            tenant = cls.tenants[request.tenant] = _Tenant(self._tenant_weights.get(request.tenant, 1))
        kind = (entry.eligible, entry.parked)
        lane = tenant.lanes.get(kind)
        if lane is None:
            lane = tenant.lanes[kind] = _Lane(kind)
        if not cls.live and cls.virtual_time < self._present:
            cls.virtual_time = self._present
        if not tenant.live and tenant.virtual_time < cls.present:
            tenant.virtual_time = cls.present
        heappush(lane.heap, (request.priority, entry.seq, entry))
        lane.live += 1
        tenant.live += 1
        cls.live += 1
        cls.kinds[kind] = cls.kinds.get(kind, 0) + 1
        self.num_waiting += 1
        if not tenant.queued:
            tenant.queued = True
            heappush(cls.order, (tenant.virtual_time, request.tenant))

    def pop(self, free: int, up: int, *, yielding: bool = False) -> Entry | None:
        """Take the next entry, in fair order, that a mode of the bit set `free` may serve; None if there is none.

        Those that let others go first are taken only by calls that ask for them.
        """
        first: _Class | None = None
        for cls in self._all:
            if cls.live and (first is None or cls.virtual_time < first.virtual_time):
                for kind in cls.kinds:
                    if _serves(kind, free, up, yielding):
                        first = cls
                        break
        return None if first is None else self._pop_class(first, free, up, yielding)

    def charge(self, entry: Entry) -> None:
        """The entry that was just popped is served: its class and its tenant pay for its tokens."""
        request = entry.request
        cls = self._classes[request.service_class]
        tenant = cls.tenants[request.tenant]
        tokens = entry.weight_tokens
        start = cls.virtual_time
        if start > self._present:
            self._present = start
        elif start < self._present - _LAG_MOST:
            start = self._present - _LAG_MOST
        cls.virtual_time = start + tokens / cls.weight
        start = tenant.virtual_time
        if start > cls.present:
            cls.present = start
        elif start < cls.present - _LAG_MOST:
            start = cls.present - _LAG_MOST
        tenant.virtual_time = start + tokens / tenant.weight

    def discard(self, entry: Entry) -> None:
        """The entry leaves the queue for another reason (cancelled, expired); call it after its phase changed."""
        cls = self._classes[entry.request.service_class]
        tenant = cls.tenants[entry.request.tenant]
        lane = tenant.lanes[(entry.eligible, entry.parked)]
        self._count_out(cls, tenant, lane)
        lane.compact()

    def withdraw(self, entries: Sequence[Entry]) -> None:
        """Take these out for good, so that they may be pushed anew; call it after their phase changed.

        Unlike `discard` it leaves no dead items behind, which would come to life again with the push.
        """
        lanes: dict[int, _Lane] = {}
        for entry in entries:
            cls = self._classes[entry.request.service_class]
            tenant = cls.tenants[entry.request.tenant]
            lane = tenant.lanes[(entry.eligible, entry.parked)]
            self._count_out(cls, tenant, lane)
            lanes[id(lane)] = lane
        for lane in lanes.values():
            lane.heap = [item for item in lane.heap if item[2].phase is Phase.WAITING]
            heapify(lane.heap)

    def entries(self) -> Iterator[Entry]:
        """All that wait, in no order; for the checks and the drain."""
        for cls in self._classes.values():
            for tenant in cls.tenants.values():
                for lane in tenant.lanes.values():
                    for item in lane.heap:
                        if item[2].phase is Phase.WAITING:
                            yield item[2]

    def _count_out(self, cls: _Class, tenant: _Tenant, lane: _Lane) -> None:
        lane.live -= 1
        tenant.live -= 1
        cls.live -= 1
        self.num_waiting -= 1
        left = cls.kinds[lane.kind] - 1
        if left:
            cls.kinds[lane.kind] = left
        else:
            del cls.kinds[lane.kind]

    def _pop_class(self, cls: _Class, free: int, up: int, yielding: bool) -> Entry | None:
        order = cls.order
        skipped: list[tuple[float, str]] = []
        found: Entry | None = None
        while order:
            tag, name = order[0]
            tenant = cls.tenants[name]
            if tenant.virtual_time > tag:
                heapreplace(order, (tenant.virtual_time, name))
            elif not tenant.live:
                # It kept its place until its debt was over; now it may start anew.
                heappop(order)
                del cls.tenants[name]
                cls.present = max(cls.present, tag)
            else:
                found = self._pop_tenant(cls, tenant, free, up, yielding)
                if found is not None:
                    break
                skipped.append(heappop(order))
        for item in skipped:
            heappush(order, item)
        return found

    def _pop_tenant(self, cls: _Class, tenant: _Tenant, free: int, up: int, yielding: bool) -> Entry | None:
        best: Item | None = None
        best_lane: _Lane | None = None
        for lane in tenant.lanes.values():
            if lane.live and _serves(lane.kind, free, up, yielding):
                head = lane.head()
                if head is not None and (best is None or head < best):
                    best, best_lane = head, lane
        if best is None or best_lane is None:
            return None
        heappop(best_lane.heap)
        self._count_out(cls, tenant, best_lane)
        return best[2]


def _forget_idle(cls: _Class) -> None:
    """Drop the tenants that wait for nothing: names that come once must not pile up while no mode is free."""
    cls.tenants = {name: tenant for name, tenant in cls.tenants.items() if tenant.live}
    cls.order = [(tenant.virtual_time, name) for name, tenant in cls.tenants.items()]
    heapify(cls.order)
