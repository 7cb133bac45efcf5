"""What waits, in fair order: service classes by weight, tenants by virtual time, then priority, then arrival.

Start-time fair queueing (Goyal et al., SIGCOMM 1996) twice: between the service classes and, inside each, between
tenants. A winner's virtual time advances by its tokens over its weight, so no class and no tenant starves. Within a
tenant, requests lie in *lanes* by the set of modes that may serve them: a request that only a busy mode may serve never
hides one that an idle mode could take. Removal is lazy: an entry that no longer waits is dropped when it surfaces, and
a lane is rebuilt when most of it is dead. All operations are O(log n).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush

from msd.core.entry import Entry, Phase
from msd.domain import SERVICE_CLASSES, ServiceClass

_DEAD_ALLOWED = 64
Item = tuple[int, int, Entry]


class _Lane:
    """Requests of one tenant with the same eligible modes and the same parking; a heap of (priority, seq, entry)."""

    __slots__ = ("eligible", "heap", "live", "parked")

    def __init__(self, eligible: int, parked: int) -> None:
        self.eligible = eligible
        self.parked = parked
        self.heap: list[Item] = []
        self.live = 0

    def serves(self, free: int, up: int) -> bool:
        """Whether a mode in the bit set `free` may take its head. A parked lane opens again when its mode is down."""
        if self.parked >= 0 and up >> self.parked & 1:
            return bool(free >> self.parked & 1)
        return bool(self.eligible & free)

    def head(self) -> Item | None:
        """The first entry that still waits here; drops the dead before it."""
        heap = self.heap
        while heap:
            entry = heap[0][2]
            if entry.phase is Phase.WAITING and entry.parked == self.parked:
                return heap[0]
            heappop(heap)
        return None

    def compact(self) -> None:
        """Drop the dead when they are most of the heap."""
        if len(self.heap) > 2 * self.live + _DEAD_ALLOWED:
            parked = self.parked
            self.heap = [item for item in self.heap if item[2].phase is Phase.WAITING and item[2].parked == parked]
            heapify(self.heap)


class _Tenant:
    __slots__ = ("lanes", "live", "queued", "virtual_time", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.virtual_time = 0.0
        self.lanes: dict[tuple[int, int], _Lane] = {}
        self.live = 0
        self.queued = False


class _Class:
    __slots__ = ("live", "order", "tenants", "virtual_time", "weight")

    def __init__(self, weight: int) -> None:
        self.weight = weight
        self.virtual_time = 0.0
        self.live = 0
        self.tenants: dict[str, _Tenant] = {}
        self.order: list[tuple[float, str]] = []
        """Heap of tenants with live entries, by virtual time."""


class FairQueue:
    """The waiting requests. The scheduler changes `entry.phase`; the queue keeps order and counts."""

    def __init__(self, class_weights: Mapping[ServiceClass, int], tenant_weights: Mapping[str, int]) -> None:
        self._classes = {name: _Class(class_weights.get(name, 1)) for name in SERVICE_CLASSES}
        self._tenant_weights = tenant_weights
        self.num_waiting = 0

    def __len__(self) -> int:
        return self.num_waiting

    def push(self, entry: Entry) -> None:
        """Add an entry in phase WAITING (or put a parked or retried one back at its old place, by `seq`)."""
        request = entry.request
        cls = self._classes[request.service_class]
        tenant = cls.tenants.get(request.tenant)
        if tenant is None:
            tenant = cls.tenants[request.tenant] = _Tenant(self._tenant_weights.get(request.tenant, 1))
        key = (entry.eligible, entry.parked)
        lane = tenant.lanes.get(key)
        if lane is None:
            lane = tenant.lanes[key] = _Lane(*key)
        if not cls.live:
            # A class (or tenant) that comes back from idle starts at the present: it cannot save up service.
            cls.virtual_time = max(cls.virtual_time, self._least_class_time())
        if not tenant.live:
            tenant.virtual_time = max(tenant.virtual_time, cls.order[0][0] if cls.order else 0.0)
        heappush(lane.heap, (request.priority, entry.seq, entry))
        lane.live += 1
        tenant.live += 1
        cls.live += 1
        self.num_waiting += 1
        if not tenant.queued:
            tenant.queued = True
            heappush(cls.order, (tenant.virtual_time, request.tenant))

    def pop(self, free: int, up: int) -> Entry | None:
        """Take the next entry, in fair order, that a mode of the bit set `free` may serve; None if there is none."""
        classes = [cls for cls in self._classes.values() if cls.live]
        if len(classes) > 1:
            classes.sort(key=_by_virtual_time)
        for cls in classes:
            entry = self._pop_class(cls, free, up)
            if entry is not None:
                cls.virtual_time += entry.weight_tokens / cls.weight
                return entry
        return None

    def discard(self, entry: Entry) -> None:
        """The entry leaves the queue for another reason (cancelled, expired); call it after its phase changed."""
        cls = self._classes[entry.request.service_class]
        tenant = cls.tenants[entry.request.tenant]
        lane = tenant.lanes[(entry.eligible, entry.parked)]
        self._count_out(cls, tenant, lane)
        lane.compact()

    def entries(self) -> Iterator[Entry]:
        """All that wait, in no order; for the checks and the drain."""
        for cls in self._classes.values():
            for tenant in cls.tenants.values():
                for lane in tenant.lanes.values():
                    for item in lane.heap:
                        if item[2].phase is Phase.WAITING and item[2].parked == lane.parked:
                            yield item[2]

    def _least_class_time(self) -> float:
        return min((cls.virtual_time for cls in self._classes.values() if cls.live), default=0.0)

    def _count_out(self, cls: _Class, tenant: _Tenant, lane: _Lane) -> None:
        lane.live -= 1
        tenant.live -= 1
        cls.live -= 1
        self.num_waiting -= 1

    def _pop_class(self, cls: _Class, free: int, up: int) -> Entry | None:
        order = cls.order
        skipped: list[tuple[float, str]] = []
        found: Entry | None = None
        while order:
            virtual_time, name = heappop(order)
            tenant = cls.tenants[name]
            if not tenant.live:
                del cls.tenants[name]
                continue
            found = self._pop_tenant(cls, tenant, free, up)
            if found is None:
                skipped.append((virtual_time, name))
                continue
            tenant.virtual_time = max(tenant.virtual_time, virtual_time) + found.weight_tokens / tenant.weight
            # Also when it is empty now: it keeps its virtual time until it surfaces again.
            heappush(order, (tenant.virtual_time, name))
            break
        for item in skipped:
            heappush(order, item)
        return found

    def _pop_tenant(self, cls: _Class, tenant: _Tenant, free: int, up: int) -> Entry | None:
        best: Item | None = None
        best_lane: _Lane | None = None
        for lane in tenant.lanes.values():
            if lane.live and lane.serves(free, up):
                head = lane.head()
                if head is not None and (best is None or head < best):
                    best, best_lane = head, lane
        if best is None or best_lane is None:
            return None
        heappop(best_lane.heap)
        self._count_out(cls, tenant, best_lane)
        return best[2]


def _by_virtual_time(cls: _Class) -> float:
    return cls.virtual_time
