"""Which of a batch of requests goes to which replica: a minimum-cost assignment with rising marginal costs.

Successive shortest paths on the graph of replicas (Ahuja, Magnanti, Orlin: Network Flows, ch. 9.7): requests enter in
order, each along the cheapest chain "request enters replica a, one of a's moves to b, ..., which has room". Costs of
filling a replica rise with every request, so that each augmentation keeps the whole assignment optimal. For k requests
and R replicas: O(k · R · (k + R²)), which the caller bounds by bounding both.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

_EPSILON = 1e-9


def assign(costs: Sequence[Sequence[float]], room: Sequence[int], congestion: Sequence[float]) -> list[int | None]:
    """For each request its replica, or None where nothing it may use has room.

    `costs[q][r]` is the cost of request q on replica r (inf: may not run there); `room[r]` the number of requests
    that r takes; the j-th request on r (from 0) costs j · `congestion[r]` more. A later request may move an earlier
    one, but never puts it out. Minimises the sum among the assignments that serve the same requests.
    """
    chosen: list[int | None] = [None] * len(costs)
    held: list[list[int]] = [[] for _ in room]
    edges: list[_Edges] = [[None] * len(room) for _ in room]
    for request in range(len(costs)):
        path = _cheapest_path(costs[request], request, room, congestion, held, edges)
        for mover, source, target in path:
            if source is not None:
                held[source].remove(mover)
            held[target].append(mover)
            chosen[mover] = target
        for changed in {target for _, _, target in path}:
            edges[changed] = _cheapest_moves(changed, costs, held[changed], len(room))
    return chosen


_Move = tuple[int, int | None, int]
_Edges = list[tuple[float, int] | None]
"""From one replica: for each target the cheapest request to move there and what that costs."""


def _cheapest_path(
    costs: Sequence[float],
    request: int,
    room: Sequence[int],
    congestion: Sequence[float],
    held: Sequence[Sequence[int]],
    edges: Sequence[_Edges],
) -> list[_Move]:
    """Moves (request, from, to) that let `request` in at least cost; empty if there is no way in."""
    count = len(room)
    distance = list(costs)
    moves: list[_Move] = [(request, None, target) for target in range(count)]
    for _ in range(count - 1):
        if not _relax(distance, moves, edges):
            break
    best, best_cost = None, inf
    for target in range(count):
        if len(held[target]) < room[target]:
            total = distance[target] + congestion[target] * len(held[target])
            if total < best_cost:
                best, best_cost = target, total
    return [] if best is None else _trace(best, moves)


def _cheapest_moves(source: int, costs: Sequence[Sequence[float]], held: Sequence[int], count: int) -> _Edges:
    if not held:
        return [None] * count
    return [
        None if target == source else min((costs[mover][target] - costs[mover][source], mover) for mover in held)
        for target in range(count)
    ]


def _relax(distance: list[float], moves: list[_Move], edges: Sequence[_Edges]) -> bool:
    """One Bellman-Ford round over all replicas. True if a distance fell."""
    fell = False
    for source, row in enumerate(edges):
        if distance[source] == inf:
            continue
        for target, edge in enumerate(row):
            if edge is not None and distance[source] + edge[0] < distance[target] - _EPSILON:
                distance[target] = distance[source] + edge[0]
                moves[target] = (edge[1], source, target)
                fell = True
    return fell


def _trace(target: int, moves: Sequence[_Move]) -> list[_Move]:
    """The chain of moves that ends in `target`, last move first: each makes room for the one after it."""
    path: list[_Move] = []
    at: int | None = target
    while at is not None:
        move = moves[at]
        path.append(move)
        at = move[1]
        assert len(path) <= len(moves), "a negative cycle in the assignment"
    return path
