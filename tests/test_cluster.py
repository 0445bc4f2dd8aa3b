"""Tuning on a real cluster: worker processes of this machine, one of them killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import convsched as cs
from convsched.autotune.search import cluster as module
from convsched.autotune.search.budget import Budget
from convsched.autotune.search.cluster import ClusterError, alone, tune_on
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record, Run, parse_line
from convsched.machine import host
from convsched.plan.plan import Target
from convsched.problem import Problem

distributed = pytest.importorskip("distributed")

LAYERS: list[Problem] = [cs.Conv2d(16, 16, 1, input_size=6), cs.Linear(32, 16)]
COUNT = 2
FEW, ENDLESS = Budget(candidates=COUNT), Budget(candidates=100_000)

pytestmark = pytest.mark.xdist_group("cluster")  # they share the cluster, which takes seconds to start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of the workers."""
    return tmp_path_factory.mktemp("workers")


def start(folder: Path, n_workers: int) -> Any:
    """A cluster of worker processes of one thread each."""
    return distributed.LocalCluster(n_workers=n_workers, processes=True, threads_per_worker=1, silence_logs=50,
                                    dashboard_address=":0", env={"CONVSCHED_CACHE": str(folder)})


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    """Of a cluster of two worker processes on one host."""
    with start(folder, n_workers=2) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def cache(tmp_path: Path) -> ScheduleCache:
    return ScheduleCache(tmp_path / "schedules.sqlite")


def known(cache: ScheduleCache, layer: Problem) -> set[str]:
    """The schedules measured for a layer on this machine, which all workers share."""
    return {record.schedule for record in cache.records(Key.of(layer, Target(host.machine())))}


def test_layers_are_tuned_and_the_caller_writes(client: Any, cache: ScheduleCache, folder: Path) -> None:
    reported: list[Record] = []

    def report(worker: str, record: Record) -> None:
        assert worker in client.nthreads()
        assert sum(map(len, client.processing().values())) <= 1  # two workers, but one host
        assert record in cache.records(record.key)
        assert threading.current_thread() is threading.main_thread()
        reported.append(record)

    found = tune_on(client, [(layer, FEW) for layer in LAYERS], cache=cache, threads=1, report=report)
    assert [tuned.problem for tuned in found] == LAYERS
    assert [tuned.tried for tuned in found] == [COUNT, COUNT]
    for layer, tuned in zip(LAYERS, found, strict=True):
        assert tuned.schedule.text in known(cache, layer)
        assert known(cache, layer) == {record.schedule for record in reported if record.problem == layer.text}
        run = cache.run_of(Key.of(layer, Target(host.machine())))
        assert run is not None
        assert run.tried == COUNT
    assert len(reported) == len(set(reported))
    assert any(folder.iterdir())
    assert not list(folder.rglob("*.sqlite*"))

    before = known(cache, LAYERS[0])
    again = tune_on(client, [(LAYERS[0], Budget(candidates=0))], cache=cache, threads=1)
    assert again[0].tried == 0  # not even the default, which is measured whatever the budget
    assert known(cache, LAYERS[0]) == before


def killer(client: Any, after: int, killed: list[str]) -> Callable[[str, Record], None]:
    """A report that kills the first worker's process after so many records."""
    processes = client.run(os.getpid)
    seen: list[Record] = []

    def report(worker: str, record: Record) -> None:
        seen.append(record)
        if len(seen) == after:
            killed.append(worker)
            os.kill(processes[worker], signal.SIGKILL)

    return report


def test_a_layer_whose_worker_is_killed_goes_on_elsewhere(client: Any, cache: ScheduleCache) -> None:
    killed: list[str] = []
    work = [(layer, FEW) for layer in LAYERS]
    found = tune_on(client, work, cache=cache, threads=1, report=killer(client, 1, killed))
    assert len(killed) == 1
    assert killed[0] not in client.nthreads()
    assert [tuned.problem for tuned in found] == LAYERS
    assert len(known(cache, LAYERS[0])) > COUNT  # those of the killed worker, and as many others
    assert len(known(cache, LAYERS[1])) == COUNT


def test_a_layer_that_kills_its_workers_is_given_up(client: Any, cache: ScheduleCache,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIES", 1)
    work = [(layer, FEW) for layer in LAYERS]
    with pytest.raises(ClusterError) as error:
        tune_on(client, work, cache=cache, threads=1, report=killer(client, 1, []))
    assert "1 of 2 layers failed" in str(error.value)
    assert f"{LAYERS[0].text}: 1 workers were lost with it, the last at tcp://" in str(error.value)
    assert len(known(cache, LAYERS[0])) >= 1
    assert len(known(cache, LAYERS[1])) == COUNT


def test_an_interruption_stops_the_tasks_and_keeps_what_came(client: Any, cache: ScheduleCache) -> None:
    seen: list[str] = []

    def interrupt(_: str, record: Record) -> None:
        seen.append(record.schedule)
        if len(seen) == 2:
            raise KeyboardInterrupt

    layer = cs.Conv2d(64, 64, 3, input_size=8)
    with pytest.raises(KeyboardInterrupt):
        tune_on(client, [(layer, ENDLESS)] * 2, cache=cache, threads=1, report=interrupt)
    assert set(seen) <= known(cache, layer)
    # The host's lock is free again, since the task has ended early, and the second one has not begun.
    assert tune_on(client, [(LAYERS[0], FEW)], cache=cache, threads=1)[0].tried == COUNT
    events = [event for topic, events in client.get_events().items() if topic.startswith("convsched-")
              for event in events]
    ends = [end for _, (_, line) in events if isinstance(end := parse_line(line), Run) and end.problem == layer.text]
    assert [end.complete for end in ends] == [False]


def test_workers_that_join_are_used_each_host_on_its_own(client: Any, cache: ScheduleCache, folder: Path) -> None:
    hosts: set[str] = set()
    command = [sys.executable, "-m", "distributed.cli.dask_worker", client.scheduler.address, "--host",
               "127.0.0.2", "--no-dashboard", "--no-nanny", "--nthreads", "4"]
    workers = len(client.nthreads())
    environment = {**os.environ, "CONVSCHED_CACHE": str(folder)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as other:
        try:
            client.wait_for_workers(workers + 1, timeout=30)
            tune_on(client, [(layer, FEW) for layer in LAYERS], cache=cache, threads=1,
                    report=lambda worker, _: hosts.add(worker.split("/")[2].split(":")[0]))
        finally:
            other.kill()
    assert hosts == {"127.0.0.1", "127.0.0.2"}


def test_another_version_is_refused(client: Any, cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module.VERSION
    monkeypatch.setattr(module, "VERSION", "99.0")
    with pytest.raises(ClusterError, match=rf"worker tcp://[\d.:]+: has convsched {own}, the caller 99\.0: pip"):
        tune_on(client, [(LAYERS[0], FEW)], cache=cache)


def test_a_worker_without_convsched_is_named(client: Any, cache: ScheduleCache) -> None:
    def hide() -> None:
        import convsched

        modules: dict[str, Any] = sys.modules
        modules["hidden"], modules["convsched"] = convsched, None

    def show() -> None:
        sys.modules["convsched"] = sys.modules.pop("hidden")

    bad = next(iter(client.nthreads()))
    client.run(hide, workers=[bad])
    try:
        with pytest.raises(ClusterError, match=rf"worker {bad} cannot use convsched .*: pip install convsched=="):
            tune_on(client, [(LAYERS[0], FEW)], cache=cache)
    finally:
        client.run(show, workers=[bad])


def test_failures_of_tuning_itself(client: Any, cache: ScheduleCache) -> None:
    with pytest.raises(ClusterError, match=r"1 of 1 layers failed.*\n.*spiral.*\(on tcp://"):
        tune_on(client, [(LAYERS[0], FEW)], cache=cache, threads=1, layout="spiral")


def test_a_cluster_that_is_closed(cache: ScheduleCache, folder: Path) -> None:
    cluster = start(folder, n_workers=1)
    with (distributed.Client(cluster) as client,
          pytest.raises(ClusterError, match=r"the connection to the cluster is lost \(.*\): what came is kept")):
        tune_on(client, [(LAYERS[0], FEW)], cache=cache, threads=1, report=lambda *_: cluster.close())
    assert known(cache, LAYERS[0])


def test_a_cluster_without_workers(cache: ScheduleCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    with (start(folder, n_workers=0) as cluster, distributed.Client(cluster) as client,
          pytest.raises(ClusterError, match=r"had no workers for 0\.2 s")):
        tune_on(client, [(LAYERS[0], FEW)], cache=cache)


def test_no_work_needs_no_workers(client: Any, cache: ScheduleCache) -> None:
    assert tune_on(client, [], cache=cache) == []


def test_clients_that_are_none(cache: ScheduleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = "tcp://10.0.0.1:8786"
    with pytest.raises(ClusterError, match=r"client='tcp://10.0.0.1:8786': give a distributed.Client"):
        tune_on(given, [], cache=cache)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install convsched\[cluster\]"):
        tune_on(given, [], cache=cache)


def test_one_at_a_time_on_a_host() -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with alone():
            inside.append(1)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert most == [1] * 5
