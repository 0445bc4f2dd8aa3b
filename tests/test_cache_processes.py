"""The schedule cache among processes: other writers, kill -9, and the rights and limits of the system."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
from convsched.errors import CacheWarning
from convsched.machine import Machine
from convsched.plan.plan import Target
from convsched.problem import Conv2d

KEY = Key.of(Conv2d(8, 16, 3, padding=1, input_size=14), Target(Machine.example("avx512")))
PUTS = 100

# A process that puts records without end or so many, and says after each that it is kept.
WRITER = """
import sys
from itertools import count, islice
from pathlib import Path
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
cache, key = ScheduleCache(Path(sys.argv[1])), Key.from_json(sys.argv[2])
for i in islice(count(), int(sys.argv[4]) or None):
    record = Record(**vars(key), algorithm="direct", schedule=f"unroll c{sys.argv[3]}_{i}", status="ok",
                    hot=1.0 + i, time=float(i), recipe="x" * 3000)
    if cache.put(record):
        print(i, flush=True)
"""


def make(schedule: str = "unroll c", hot: float = 1.0, time: float = 1.0) -> Record:
    return Record(**vars(KEY), algorithm="direct", schedule=schedule, status="ok", hot=hot, time=time)


def writer(path: Path, name: str, puts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(path), KEY.to_json(), name, str(puts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "schedules.sqlite"


@pytest.fixture
def full(path: Path) -> ScheduleCache:
    """A cache of a few hundred kilobytes."""
    cache = ScheduleCache(path)
    lines = path.with_name("lines")
    lines.write_text("".join(f"{make(f'unroll c{i}', 1.0 + i).to_json()}\n" for i in range(300)))
    cache.import_(lines)
    return cache


def integrity(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def test_concurrent_writers_lose_nothing(path: Path) -> None:
    writers = [writer(path, str(i), PUTS) for i in range(4)]  # and all of them make the file
    for process in writers:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    found = {record.schedule for record in ScheduleCache(path).records(KEY)}
    assert found == {f"unroll c{i}_{j}" for i in range(4) for j in range(PUTS)}
    assert integrity(path) == "ok"


def test_concurrent_threads_lose_nothing(path: Path) -> None:
    cache = ScheduleCache(path)

    def put(name: int) -> None:
        for i in range(25):
            cache.put(make(f"unroll c{name}_{i}"))

    threads = [threading.Thread(target=put, args=(name,)) for name in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(cache.records(KEY)) == 100


def test_kill_in_mid_write_loses_nothing_that_was_kept(path: Path) -> None:
    kept: set[str] = set()
    for i in range(8):
        process = writer(path, str(i))
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(random.Random(i).randrange(1, 40))]
        threading.Event().wait(random.Random(i).random() * 3e-3)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)
        numbers = "".join([*lines, rest]).split("\n")[:-1]  # a line without an end was not all written
        kept |= {f"unroll c{i}_{number}" for number in numbers}
        cache = ScheduleCache(path)  # the first reader after the kill rolls back
        assert {record.schedule for record in cache.records(KEY)} >= kept
        assert cache.put(make())
    assert len(kept) > 8
    assert integrity(path) == "ok"


# A process that tunes, for real.
TUNER = """
import sys
from pathlib import Path
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.search.tune import tune
from convsched.problem import Conv2d
layer = Conv2d(8, 16, 1, input_size=6)
print(tune(layer, budget="2 candidates", threads=1, cache=ScheduleCache(Path(sys.argv[1]))).tried)
"""


def test_two_tuners_share_a_cache(path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", TUNER, str(path)]
    tuners = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in tuners:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output, errors) == (0, "2\n", "")
    (entry,) = ScheduleCache(path).entries()
    assert 2 <= entry.candidates <= 4
    assert entry.winner is not None
    assert entry.default is not None
    assert integrity(path) == "ok"


# A process that is killed by itself inside a transaction, when a part of it is in the file already.
DIES = """
import os, signal, sys
from pathlib import Path
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
cache, key = ScheduleCache(Path(sys.argv[1])), Key.from_json(sys.argv[2])
def die(db):
    db.execute("PRAGMA cache_size = 1")
    for i in range(300):
        row = (*vars(key).values(), "direct", f"unroll d{i}", "x" * 3000)
        db.execute(f"INSERT INTO candidates VALUES ({', '.join('?' * len(row))})", row)
    db.execute("DELETE FROM candidates WHERE schedule LIKE 'unroll c%'")
    os.kill(os.getpid(), signal.SIGKILL)
cache._database.write(die)
"""


def test_a_kill_inside_a_transaction_takes_it_back(full: ScheduleCache) -> None:
    before, size = full.records(KEY), full.path.stat().st_size
    done = subprocess.run([sys.executable, "-c", DIES, str(full.path), KEY.to_json()], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert full.path.stat().st_size > size  # half of it was there
    assert Path(f"{full.path}-journal").stat().st_size > 0
    assert full.records(KEY) == before
    assert full.put(make("unroll m"))
    assert integrity(full.path) == "ok"


def test_many_find_the_file_corrupt_at_once(path: Path) -> None:
    path.write_bytes(b"rubbish" * 9999)
    writers = [writer(path, str(i), 20) for i in range(3)]
    for process in writers: process.communicate(timeout=60)
    cache = ScheduleCache(path)
    with contextlib.suppress(CacheWarning):
        assert cache.put(make())
    assert integrity(path) == "ok"
    assert Path(f"{path}.corrupt").read_bytes() == b"rubbish" * 9999


# A process without rights, which reads and then writes.
UNPRIVILEGED = """
import os, sys, warnings
from pathlib import Path
from convsched.autotune.store.cache import ScheduleCache
from convsched.autotune.store.record import Key, Record
cache, key = ScheduleCache(Path(sys.argv[1])), Key.from_json(sys.argv[2])
cache.entries()  # all imports are done
if os.geteuid() == 0: os.setuid(65534)
warnings.simplefilter("always")
hit = cache.best(key)
record = Record(**vars(key), algorithm="direct", schedule="unroll m", status="ok", hot=0.1, time=2.0)
print(hit.record.schedule, cache.put(record), cache.put(record))
"""


@pytest.mark.parametrize(("file", "folder"), [(0o444, 0o555), (0o444, 0o777), (0o644, 0o555)])
def test_a_file_and_a_folder_that_may_not_be_written(full: ScheduleCache, file: int, folder: int) -> None:
    """The real thing, as an image of a container or another user's cache has it."""
    with tempfile.TemporaryDirectory() as name:  # where others may look
        path = Path(name) / "schedules.sqlite"
        shutil.copy(full.path, path)
        before = path.read_bytes()
        path.chmod(file)
        path.parent.chmod(folder)
        command = [sys.executable, "-c", UNPRIVILEGED, str(path), KEY.to_json()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        path.parent.chmod(0o755)
        assert (done.stdout, done.stderr.count("Warning: there is no schedule cache")) == ("unroll c0 False False\n", 1)
        assert path.read_bytes() == before


def test_a_limit_of_the_system_is_no_cache(full: ScheduleCache) -> None:
    """The real thing: the system refuses to make the file larger."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({full.path.stat().st_size},) * 2)\n"
    report = "import warnings; warnings.simplefilter('always')\n"
    command = [sys.executable, "-c", limit + report + WRITER, str(full.path), KEY.to_json(), "x", "50"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("Warning: there is no schedule cache") == 1
    kept = {f"unroll cx_{number}" for number in done.stdout.split()}
    assert {record.schedule for record in full.records(KEY)} == kept | {f"unroll c{i}" for i in range(300)}
    assert integrity(full.path) == "ok"
