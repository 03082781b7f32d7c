"""When an ended job's MLflow run is completed, decided from a snapshot and nothing else.

A publisher is a Ray Job of its own that needs no share of the cluster. MLflow being away is no error: it is tried again, ever
less often, until it works. The number of publishers that have ended is in the job, so that the current one is found after any
restart.
"""

from __future__ import annotations

from service.controller.decision import Action, Policy, Publication, Publish, Published, Snapshot, StopPublisher

EXIT_NEVER = 2
"""Exit code of a publisher that can do nothing, however often it is tried."""


def publish(snapshot: Snapshot, policy: Policy) -> list[Action | None]:
    """Follow the publishers that run, and start those that are due."""
    if snapshot.capacity is None:
        return []
    actions: list[Action | None] = []
    running = sum(each.ray is not None and not each.ray.is_terminal for each in snapshot.publications)
    for each in snapshot.publications:
        if each.ray is None:
            if not snapshot.mlflow_error and running < policy.max_publishers:
                running += 1
                actions.append(Publish(each.job))
        elif each.ray.is_terminal:
            actions.append(_over(each, snapshot, policy))
        elif each.running_s >= policy.publisher_limit_s:
            actions.append(StopPublisher(each.job))
    return actions


def _over(publication: Publication, snapshot: Snapshot, policy: Policy) -> Published:
    """What the end of a publisher means."""
    job, ray = publication.job, publication.ray
    assert ray is not None
    if ray.exit_code == 0 or (ray.exit_code is None and ray.status == "SUCCEEDED"):
        # Of one that was lost or stopped early nobody may know whether it had begun a run: the publisher has looked.
        message = "the MLflow run is complete" if job.mlflow_run_id else "MLflow has no open run of it"
        return Published(job, "done", None, message)
    if ray.exit_code == EXIT_NEVER:
        return Published(job, "error", None, "the MLflow run cannot be completed; the publisher's log says why")
    pause = policy.publish_backoff(job.publish_tries + 1)
    ending = (
        "MLflow was away" if ray.exit_code == 1 else f"the publisher ended as {ray.status} (exit code {ray.exit_code})"
    )
    message = f"{ending}; it is tried again in {pause.total_seconds():g} s"
    return Published(job, "pending", snapshot.now + pause, message)
