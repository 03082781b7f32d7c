"""What fits on which node."""

from __future__ import annotations

import pytest

from ncfm_core.errors import NoNodeError
from ncfm_core.submission import resolve
from worker.tasks import Demand, Node, demand


@pytest.mark.parametrize(
    ("node", "wanted", "slots"),
    [
        (Node(8, 0), Demand(2, 0.0), 4),
        (Node(8, 4), Demand(1, 2.0), 2),
        (Node(8, 0.3), Demand(1, 0.1), 3),
        (Node(99, 1), Demand(1, 0.1), 10),
        # No task takes parts of two GPUs.
        (Node(8, 2), Demand(1, 0.6), 2),
        (Node(8, 0), Demand(1, 0.5), 0),
        (Node(1, 4), Demand(2, 1.0), 0),
    ],
)
def test_slots_are_counted_as_ray_counts(node: Node, wanted: Demand, slots: int) -> None:
    assert node.slots(wanted) == slots


def test_gpus_that_are_automatic_are_what_is_there_unless_said() -> None:
    resources = resolve({"dataset": "digits", "ipc": 1, "resources": {"cpus": 1}}).resources
    assert demand(resources, (Node(4, 0), Node(4, 1))).gpus == 1
    assert demand(resources, (Node(4, 0),)).gpus == 0
    assert demand(resources, (Node(4, 0), Node(4, 1)), auto=0.0).device == "cpu"
    with pytest.raises(NoNodeError, match="no node of the cluster has so many GPUs"):
        demand(resources, (Node(4, 0),), auto=1.0)
