"""A bar for each stage of a job that runs, and one for the whole job."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

from service.replies import Job

FINISHED = frozenset({"done", "cached", "skipped"})


class StageBars:
    """Keeps the bars of a `rich` progress display like the job."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._state = ""
        self._whole: TaskID | None = None

    @staticmethod
    def columns() -> tuple[ProgressColumn, ...]:
        """What a bar consists of."""
        return (
            TextColumn("{task.description:10}"),
            BarColumn(),
            TextColumn("{task.fields[note]:26}"),
            TimeElapsedColumn(),
        )

    def update(self, job: Job) -> None:
        """Show the job as it is now."""
        if job.state != self._state:
            self._state = job.state
            why = f" ({job.message or job.reason})" if job.message or job.reason else ""
            self._progress.console.print(f"{job.state}{why}", markup=False)
        for name, state in job.stages.items():
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=None, start=False, visible=False, note="")
            self._update_bar(name, state, job)
        if job.progress is not None and job.progress.job_percent is not None:
            self._update_whole(job.progress.job_percent, "" if job.is_final else job.progress.job_count)

    def _update_whole(self, percent: float, note: str) -> None:
        """The bar of the whole job, below its stages."""
        if self._whole is None:
            self._whole = self._progress.add_task("job", total=100, note="")
        self._progress.update(self._whole, completed=percent, note=note)

    def _update_bar(self, name: str, state: str, job: Job) -> None:
        bar = self._bars[name]
        if state in FINISHED:
            self._progress.start_task(bar)
            self._progress.update(bar, total=1, completed=1, note=state, visible=True)
            self._progress.stop_task(bar)
        elif job.progress is not None and job.progress.stage == name:
            if not self._progress.tasks[bar].started:
                self._progress.start_task(bar)
            note = job.progress.count
            total = job.progress.total or None
            self._progress.update(bar, total=total, completed=job.progress.completed, note=note, visible=True)
