"""Tasks on Dask: a cluster, or processes of this machine that Dask starts (the extra `dask`)."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import dask
from distributed import Client, LocalCluster, as_completed

from tzip.hub.engines import RETRIES, Failure, Task, Then, attempt
from tzip.workers import thread_count


class DaskEngine:
    """One Dask task for each item. Dask runs those again whose worker was killed.

    `where`: the scheduler's address, a number of workers to start here, or "" for the scheduler that Dask's configuration
    names (`DASK_SCHEDULER_ADDRESS`), else as many as there are CPUs.
    """

    def __init__(self, where: str, threads: int) -> None:
        self.cluster: Any = None
        self.stack = contextlib.ExitStack()
        here = int(where) if where.isdecimal() else max(1, thread_count(None) // threads)
        if where.isdecimal() or not (where or dask.config.get("scheduler-address", None)):
            # A local cluster gives up a process that is not back 15 seconds after a death, and then waits for ever.
            self.stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day"}))
            self.cluster = LocalCluster(
                n_workers=here, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0
            )
        self.client = Client(self.cluster or where or None)

    def map(self, task: Task, items: Iterable[Any], then: Then | None = None) -> Iterator[tuple[Any, Any]]:
        """See Engine."""

        def submit(item: Any, suspect: bool = False) -> Any:
            future = self.client.submit(attempt, task, item, pure=False, retries=RETRIES)
            jobs[future.key] = item, suspect
            return future

        jobs: dict[Any, tuple[Any, bool]] = {}
        suspects: list[Any] = []
        running = as_completed([submit(item) for item in items])
        while True:
            for future in running:
                item, suspect = jobs.pop(future.key)
                try:
                    result = future.result()
                except Exception as e:  # `attempt` returns those of the task: this is Dask's own
                    if not suspect:
                        suspects.append(item)
                        continue
                    result = Failure.death(type(e).__name__)
                finally:
                    future.release()
                for more in then(item, result) if then is not None else ():
                    running.add(submit(more))
                yield item, result
            if not suspects:
                return
            # Dask blames all that a killed worker had before it: by itself, each shows whether it is the one.
            running = as_completed([submit(suspects.pop(), suspect=True)])

    def close(self) -> None:
        """See Engine."""
        self.client.close()
        if self.cluster is not None:
            self.cluster.close()
        self.stack.close()
