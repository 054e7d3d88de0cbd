"""Settings of every test: few threads, no compiled caches shared with other runs, quick hypothesis."""

import os
from dataclasses import replace
from zlib import crc32

# Idle threads sleep instead of spinning: on a busy machine spinning makes tiny loops a hundred times
# slower. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes that pytest-xdist starts share the cores, and so do their children: teams of threads that want all
# of them would wait for each other. A test of threads says how many it takes.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tightrope",
    deadline=None,  # the first call of a kernel is slow
    derandomize=True,  # a failure must fail again
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("tightrope")


# Files of few tests that take minutes: first, so that two processes do not end with one of them alone.
LONG = ("test_demo.py", "test_triton_interpreter.py", "test_large_index.py")


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="all cases of tests that are marked one_in")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if not config.getoption("--every-case"):
        kept = set(a_share_of(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def a_share_of(items):
    """All tests; of those marked ``one_in(n)`` a share of the cases, by their names, and one at least."""
    numbers = {item: crc32(item.nodeid.encode()) for item in items}
    least = {}
    for item in items:
        function = (item.path, item.originalname)
        least[function] = min(least.get(function, numbers[item]), numbers[item])
    for item in items:
        mark = item.get_closest_marker("one_in")
        first = numbers[item] == least[item.path, item.originalname]
        if mark is None or first or numbers[item] % mark.args[0] == 0:
            yield item


@pytest.fixture(autouse=True)
def _restore_global_state():
    """No test leaves threads, seeds or the default dtype changed for the next."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def ranks():
    """``ranks(3)``: a pool of so many processes (`processes.Pool`), started once for all modules."""
    from processes import Pool

    pools: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file with the text of `tiny_models`."""
    from tiny_models import TEXT

    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def not_measured(monkeypatch):
    """`tightrope train` without the process that measures the loss, which takes most of a tiny run."""
    from tightrope.cli import probe

    monkeypatch.setattr(probe, "measure", lambda *_: [])


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128 entries: with few rows one is 16384 wide, and a small problem has no two to merge."""
    from tightrope.strategies import plan

    monkeypatch.setattr(plan, "CPU", replace(plan.CPU, tile=128, tile_logits=0, widest_tile=128))


@pytest.fixture
def one_thread(_restore_global_state):
    """For tests of many tiny problems, where thread teams would cost more than the work."""
    torch.set_num_threads(1)
