"""Tasks on Ray: a cluster, or processes of this machine that Ray starts (the extra `ray`)."""

from collections.abc import Iterable, Iterator
from typing import Any

import ray

from tzip.hub.engines import RETRIES, Failure, Task, Then, attempt


class RayEngine:
    """One Ray task for each item, with as many CPUs as it has threads. Ray runs those again whose worker was killed.

    `where`: an address (`auto`, `ray://HOST:10001`), a number of CPUs to start Ray with here, or "" for what Ray finds
    (`RAY_ADDRESS`) or starts. A Ray that runs in this process already is used as it is, and left running.
    """

    def __init__(self, where: str, threads: int) -> None:
        self.threads = threads
        self.ours = not ray.is_initialized()
        if self.ours:
            here: dict[str, Any] = {"address": "local", "num_cpus": int(where), "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="ERROR", **(here if where.isdecimal() else {"address": where or None}))

    def map(self, task: Task, items: Iterable[Any], then: Then | None = None) -> Iterator[tuple[Any, Any]]:
        """See Engine."""
        remote = ray.remote(num_cpus=self.threads, max_retries=RETRIES)(attempt)
        jobs = {remote.remote(task, item): item for item in items}
        try:
            while jobs:
                ready, _ = ray.wait(list(jobs), num_returns=1)
                for one in ready:
                    item = jobs.pop(one)
                    try:
                        result = ray.get(one)
                    except ray.exceptions.RayError as e:
                        result = Failure.death(type(e).__name__)
                    if then is not None:
                        jobs |= {remote.remote(task, more): more for more in then(item, result)}
                    yield item, result
        finally:
            for one in jobs:
                ray.cancel(one, force=True)

    def close(self) -> None:
        """See Engine."""
        if self.ours:
            ray.shutdown()
