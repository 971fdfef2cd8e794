"""Engines: many processes, here or on a cluster, behind one function, `map`.

An engine promises little: a task may run more than once, at the same time too, and its process may be killed. What a task
does must be the same however often it runs.
"""

import contextlib
import importlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, Self

from tzip.coders.errors import TzipError, UsageError
from tzip.workers import thread_count

RETRIES = 3  # runs of a task after the first one whose process was killed

Task = Callable[[Any], Any]
Then = Callable[[Any, Any], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a task that failed returns: the kind of its error, what it said, and the exit code that it means."""

    kind: str
    message: str
    exit_code: int = 6

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return that of an error."""
        return cls(type(error).__name__, str(error), error.exit_code if isinstance(error, TzipError) else 6)

    @classmethod
    def death(cls, detail: str = "") -> Self:
        """Return that of a task whose process died, again and again."""
        text = f"the process of the task died {RETRIES + 1} times"
        return cls("WorkerDied", f"{text}: {detail}" if detail else text)


class Engine(Protocol):
    """Where tasks run."""

    def map(self, task: Task, items: Iterable[Any], then: Then | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield (item, what `task(item)` returned, or a Failure) for each item, as they come.

        `then(item, result)` is called first, and returns further items, which that one had to come before. Task, items and
        results are pickled.
        """

    def close(self) -> None:
        """End what this engine started. Tasks that run are killed."""


def attempt(task: Task, item: Any) -> Any:
    """Return what the task does, or a Failure: errors of one item must not stop the others, nor fail to be pickled."""
    try:
        return task(item)
    except Exception as e:
        return Failure.of(e)


_CLUSTERS = {"ray": ("tzip.hub.ray_engine", "RayEngine"), "dask": ("tzip.hub.dask_engine", "DaskEngine")}
NAMES = ("local", *_CLUSTERS)


@contextlib.contextmanager
def engine_named(text: str, threads: int = 1) -> Iterator[Engine]:
    """Start the engine `NAME` or `NAME=WHERE`; `threads` is what each task uses.

    WHERE is a number of processes on this machine, or, for ray and dask, the address of a cluster. Raises UsageError.
    """
    name, _, where = text.partition("=")
    if name not in NAMES:
        raise UsageError(f"there is no engine {name!r}; there are {', '.join(NAMES)}")
    if where.isdecimal() and not int(where):
        raise UsageError("an engine of no processes does nothing")
    engine: Engine
    if name == "local":
        if where and not where.isdecimal():
            raise UsageError(f"the local engine has a number of processes, not {where!r}")
        engine = LocalEngine(int(where) if where else max(1, thread_count(None) // threads))
    else:
        module, attribute = _CLUSTERS[name]
        try:
            engine = getattr(importlib.import_module(module), attribute)(where, threads)
        except ImportError as e:
            raise UsageError(f"the engine {name} needs its package: pip install 'tensor-tzip[{name}]' ({e})") from None
    try:
        yield engine
    finally:
        engine.close()


# ---- on this machine


def _serve(connection: Connection) -> None:
    """Do tasks until there are no more: what a process of the local engine does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends its children
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task, item = connection.recv()
            connection.send(attempt(task, item))


@dataclass(slots=True)
class _Job:
    item: Any
    deaths: int = 0


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    job: _Job | None = None


@dataclass(slots=True)
class LocalEngine:
    """Processes of this machine. One that is killed is replaced, and its task, no other, runs again.

    With one process it is this one, and nothing is started, nor replaced.
    """

    processes: int
    _workers: list[_Worker] = field(default_factory=list)

    def map(self, task: Task, items: Iterable[Any], then: Then | None = None) -> Iterator[tuple[Any, Any]]:
        """See Engine."""
        todo = deque(_Job(item) for item in items)
        while todo and self.processes == 1:
            item = todo.popleft().item
            result = attempt(task, item)
            todo.extend(_Job(more) for more in (then(item, result) if then is not None else ()))
            yield item, result
        while todo or any(w.job for w in self._workers):
            self._start(task, todo)
            for worker in self._ready():
                job, worker.job = worker.job, None
                assert job is not None
                try:
                    result = worker.connection.recv()
                except (EOFError, OSError):
                    self._bury(worker)
                    job.deaths += 1
                    if job.deaths <= RETRIES:
                        todo.appendleft(job)
                        continue
                    result = Failure.death()
                if then is not None:
                    todo.extend(_Job(item) for item in then(job.item, result))
                yield job.item, result

    def _start(self, task: Task, todo: deque[_Job]) -> None:
        """Give each idle process a job, starting processes where all are busy."""
        while todo:
            worker = next((w for w in self._workers if w.job is None), None)
            if worker is None:
                if len(self._workers) >= self.processes:
                    return
                worker = _spawn()
                self._workers.append(worker)
            try:
                worker.connection.send((task, todo[0].item))
            except (BrokenPipeError, ConnectionResetError):  # it died idle
                self._bury(worker)
                continue
            worker.job = todo.popleft()

    def _ready(self) -> list[_Worker]:
        busy = {w.connection: w for w in self._workers if w.job is not None}
        return [busy[c] for c in wait(list(busy)) if isinstance(c, Connection)]

    def _bury(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.kill()
        worker.process.join()

    def close(self) -> None:
        """See Engine."""
        for worker in list(self._workers):
            self._bury(worker)


def _spawn() -> _Worker:
    # Not forked: a fork of a process with threads may hold their locks for ever.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that its death ends the connection
    return _Worker(process, ours)
