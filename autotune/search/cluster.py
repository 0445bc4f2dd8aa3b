"""Tuning on many machines: layers are farmed out to the workers of a Dask cluster.

The caller hands out one layer at a time to each host, whatever workers and threads the host has, and a lock
on the host keeps apart what the caller cannot see: another caller, or a task of a connection that broke. A
task is the ordinary tuner with a ledger in place of the cache. The ledger starts with what the caller knows
of the worker's own machine, and sends each record as soon as it is made; the caller alone writes the cache.
So a layer whose worker is lost goes on where it was, on the next host that is free.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from convsched.autotune.search.budget import Budget, Tuned, TuneError
from convsched.autotune.search.tuner import Tuner
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record, Run, parse_line
from convsched.errors import ConvschedError
from convsched.machine import default_threads, host, machine_key
from convsched.options import Accuracy
from convsched.problem import Problem

if TYPE_CHECKING:
    from distributed import Client, Future

Report = Callable[[str, Record], None]  # of a worker's address and what it measured

VERSION = version("convsched")
TRIES = 3  # workers that may be lost with one layer
POLL_SECONDS = 0.5  # between looks at which workers there are
PATIENCE_SECONDS = 30.0  # to wait for a first worker, or for another when all are lost


class ClusterError(TuneError):
    """A cluster that cannot be used, or layers that could not be tuned on it."""


def tune_on(client: Client, work: Sequence[tuple[Problem, Budget]], *, cache: ScheduleCache,
            threads: int | None = None, layout: str = "nchw", accuracy: Accuracy = "normal",
            algorithm: str | None = None, report: Report | None = None) -> list[Tuned]:
    """Tune layers, each within its budget, on the workers of a Dask cluster; the results in order.

    Every host measures one layer at a time, keyed by its own machine, on `threads` threads (default: those
    it has). What `cache` knows of that machine is not measured again; each record is written to it, by this
    process, when it comes, and given to `report` with its worker's address. A layer whose worker is lost is
    tried on up to three workers. Workers that join are used; nothing else should run on the hosts. An
    interruption stops the tasks and keeps what came.

    Raises ClusterError: at once for a client, a worker or a version that does not fit, and for a cluster that
    is gone; for layers that failed, when all others are done.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ClusterError(f"a cluster needs Dask ({error}): pip install convsched[cluster]") from error
    if not isinstance(client, Client) or client.asynchronous:
        raise ClusterError(f"client={client!r}: give a distributed.Client that is not asynchronous")
    farm = _Farm(client, work, cache, threads, layout, accuracy, algorithm, report)
    try:
        return farm.run()
    finally:
        farm.close()


@dataclass(frozen=True)
class _Site:
    """A worker: its address, the host in it, and the machine (as keys have it) and threads there."""

    address: str
    host: str
    machine: str
    threads: int


@dataclass
class _Farm:
    """The layers that wait, run, are done or have failed, by their place in `work`."""

    client: Client
    work: Sequence[tuple[Problem, Budget]]
    cache: ScheduleCache
    threads: int | None
    layout: str
    accuracy: Accuracy
    algorithm: str | None
    report: Report | None
    name: str = field(default_factory=lambda: f"convsched-{uuid4().hex}")
    sites: dict[str, _Site] = field(default_factory=dict)
    running: dict[Future, tuple[int, _Site]] = field(default_factory=dict)
    lost: Counter[int] = field(default_factory=Counter)
    done: dict[int, Tuned] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    arrived: SimpleQueue[tuple[str, str]] = field(default_factory=SimpleQueue)
    kept: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.waiting = deque(range(len(self.work)))
        # The event is (time, message); its handler runs in a thread of the client.
        self.client.subscribe_topic(self.name, lambda event: self.arrived.put(event[1]))

    def run(self) -> list[Tuned]:
        """Until no layer waits or runs."""
        while self.waiting or self.running:
            self.look()
            self.hand_out()
            self.keep_arrived(POLL_SECONDS)
            for future in [future for future in self.running if future.done()]:
                self.collect(future)
        if self.failures:
            texts = [f"{self.work[index][0].text}: {why}" for index, why in sorted(self.failures.items())]
            raise ClusterError(f"{len(texts)} of {len(self.work)} layers failed, the others are kept:\n"
                               + "\n".join(texts))
        return [self.done[index] for index in range(len(self.work))]

    def look(self) -> None:
        """Which workers there are now; the layers of those that are gone wait again."""
        try:
            if self.client.status != "running":
                raise OSError(f"the client is {self.client.status}")
            here = set(self.client.nthreads())
        except OSError as error:
            raise ClusterError(f"the connection to the cluster is lost ({error}): what came is kept; start the "
                               "cluster anew, and the next run goes on from there") from error
        self.sites = {address: site for address, site in self.sites.items() if address in here}
        self.sites |= self.survey(sorted(here - set(self.sites)))
        for future, (_, site) in list(self.running.items()):
            if site.address not in here:
                future.cancel()
                self.lose(future)
        if not self.sites and not self.running:
            try:
                self.client.wait_for_workers(1, timeout=PATIENCE_SECONDS)
            except TimeoutError:
                raise ClusterError(f"the cluster has had no workers for {PATIENCE_SECONDS:g} s: start some with "
                                   "`dask worker` on the machines to tune on") from None

    def survey(self, addresses: list[str]) -> dict[str, _Site]:
        """What is at these workers. Raises ClusterError for one that cannot run the tasks."""
        from distributed.comm import CommClosedError, get_address_host

        found: dict[str, _Site] = {}
        if not addresses:
            return found
        answers = self.client.run(_survey, VERSION, workers=addresses, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, ConvschedError):
                raise ClusterError(f"worker {address}: {answer}")
            if isinstance(answer, CommClosedError) or address not in self.client.nthreads():
                continue  # gone already
            if isinstance(answer, Exception):
                raise ClusterError(f"worker {address} cannot use convsched ({type(answer).__name__}: {answer}): "
                                   f"pip install convsched=={VERSION} there") from answer
            found[address] = _Site(address, get_address_host(address), *answer)
        return found

    def hand_out(self) -> None:
        """A layer for every host that has none."""
        busy = {site.host for _, site in self.running.values()}
        for site in self.sites.values():
            if self.waiting and site.host not in busy:
                busy.add(site.host)
                index = self.waiting.popleft()
                problem, budget = self.work[index]
                key = Key(problem=problem.text, layout=self.layout, threads=self.threads or site.threads,
                          accuracy=self.accuracy, machine=site.machine)
                known = [record.to_json() for record in self.cache.records(key)]
                future = self.client.submit(
                    _tune, self.name, problem, budget, key, self.algorithm, known, pure=False,
                    workers=[site.address])  # and no other: its machine is in the key
                self.running[future] = index, site

    def collect(self, future: Future) -> None:
        """Take the result of a layer that is done."""
        from distributed import KilledWorker

        index, site = self.running[future]
        error: Any = future.exception() if future.status == "error" else None
        if future.status == "finished":
            try:
                tuned, lines = future.result(timeout=POLL_SECONDS)
            except TimeoutError:  # its worker is gone, and the result with it: `look` will see
                return
            self.keep((site.address, line) for line in lines)
            self.done[index] = tuned
            del self.running[future]
        elif error is None or isinstance(error, KilledWorker):
            self.lose(future)
        else:
            named = "" if isinstance(error, ConvschedError) else f"{type(error).__name__}: "
            self.failures[index] = f"{named}{error} (on {site.address})"
            del self.running[future]

    def lose(self, future: Future) -> None:
        """A layer whose worker is lost waits again, unless it was lost too often."""
        index, site = self.running.pop(future)
        self.lost[index] += 1
        if self.lost[index] < TRIES:
            self.waiting.append(index)
        else:
            self.failures[index] = (f"{TRIES} workers were lost with it, the last at {site.address}: see its log; "
                                    "it may lack memory")

    def keep_arrived(self, patience: float = 0.0) -> None:
        """Keep all that workers have sent; up to `patience` seconds later if there is nothing yet."""
        while True:
            try:
                sent = self.arrived.get(timeout=patience)
            except Empty:
                return
            self.keep([sent])
            patience = 0.0

    def keep(self, sent: Iterable[tuple[str, str]]) -> None:
        """Write what workers sent, once each, then report it."""
        for address, line in sent:
            if line in self.kept:
                continue
            self.kept.add(line)
            match parse_line(line):
                case Record() as record:
                    self.cache.put(record)
                    if self.report:
                        self.report(address, record)
                case Run() as run:
                    self.cache.mark_run(run.key, run.complete, run.budget, run.tried, run.time)

    def close(self) -> None:
        """Stop what runs still, at its next candidate, and keep what has arrived."""
        self.report = None
        self.keep_arrived()
        if self.client.status != "running":
            return
        with suppress(OSError):  # the connection is lost now
            self.client.unsubscribe_topic(self.name)
            if self.running:
                self.client.run(_stop, self.name, wait=False, on_error="ignore")
                self.client.cancel(list(self.running))


# What follows runs on the workers.

_stopped = set[str]()  # names of the farms that a worker's tasks shall work for no longer


class _Ledger:
    """Stands in for the cache: knows the records it was given, and sends those that are put."""

    def __init__(self, farm: str, known: Iterable[Record], send: Callable[[str], None]) -> None:
        self.farm, self.known, self.send = farm, list(known), send
        self.lines: list[str] = []

    def records(self, key: Key) -> tuple[Record, ...]:
        """As of a cache that holds what was known; what is put comes too."""
        return tuple(record for record in self.known if record.key == key)

    def put(self, record: Record) -> bool:
        """Send a record. Raises ClusterError when the caller wants no more, CacheError where it could not read it."""
        record.check()
        self.known.append(record)
        self.note(record.to_json())
        if self.farm in _stopped:
            raise ClusterError("stopped by the caller")
        return True

    def mark_run(self, key: Key, complete: bool, budget: str, tried: int, time: float) -> bool:
        """Send how a run ended. Raises CacheError for a key that the caller could not read."""
        run = Run(**vars(key), complete=complete, budget=budget, tried=tried, time=time)
        run.check()
        self.note(run.to_json())
        return True

    def run_of(self, key: Key) -> None:
        """It is told of candidates, not of how earlier runs ended."""

    def note(self, line: str) -> None:
        self.lines.append(line)
        self.send(line)


def _survey(wanted: str) -> tuple[str, int]:
    """This worker's machine and threads. Raises ClusterError for another version of convsched."""
    if wanted != VERSION:
        raise ClusterError(f"has convsched {VERSION}, the caller {wanted}: pip install convsched=={wanted} there")
    return machine_key(host.machine()), default_threads()


def _tune(farm: str, problem: Problem, budget: Budget, key: Key, algorithm: str | None,
          known: list[str]) -> tuple[Tuned, list[str]]:
    """Tune a layer on this worker; the result, and all lines that were sent on the way."""
    from distributed import get_worker

    worker = get_worker()
    records = (record for record in map(parse_line, known) if isinstance(record, Record))
    ledger = _Ledger(farm, records, lambda line: worker.log_event(farm, (worker.address, line)))
    with alone(), Tuner(ledger, key.target(host.machine()), algorithm) as tuner:
        return tuner.tune(problem, budget), ledger.lines


async def _stop(farm: str) -> None:
    """Let this worker's tasks of a farm end at their next candidate."""
    _stopped.add(farm)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block no other thread or process of this user on this host is in such a block."""
    path = Path(tempfile.gettempdir(), f"convsched-{os.getuid()}.lock")
    with path.open("a") as file:  # closing it, or the end of the process, lets go
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
