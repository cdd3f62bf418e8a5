"""The background thread: order, errors, bounds; the recorder on top of it."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isofast.config.schema import Config
from isofast.run.background import Background, HostCopy
from isofast.run.metrics import Evaluation, read_metrics, read_spectra
from isofast.run.recorder import Recorder, Totals

from ..support.runs import ALONE


@pytest.fixture
def background() -> Iterator[Background]:
    with closing(Background()) as background:
        yield background


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Blocks the background thread until it is set or the test ends."""
    event = threading.Event()
    yield event
    event.set()


def test_jobs_run_in_order_and_a_caller_far_ahead_waits(background, gate):
    done: list[int] = []
    background.do(gate.wait)
    futures = [background.do(lambda n=n: done.append(n)) for n in range(5)]
    assert done == [] and not any(future.done() for future in futures)
    caller = threading.Thread(
        target=lambda: [background.do(lambda n=n: done.append(n)) for n in range(5, 40)]
    )
    caller.start()
    caller.join(timeout=0.3)
    assert caller.is_alive() and done == []
    gate.set()
    caller.join(timeout=30)
    background.wait()
    assert done == [*range(40)]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_of_a_run_take_one_core_until_its_end():
    with closing(Background(one_core=True)) as background, ThreadPoolExecutor(1) as saver:
        for pool in (background.do, saver.submit):
            assert pool(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as later, closing(Background()) as background:
        for pool in (background.do, later.submit):
            assert pool(torch.get_num_threads).result() == 3
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("by", ["the next job", "waiting"])
def test_an_error_is_raised_once(background, by):
    failed = background.do(lambda: 1 / 0)
    assert isinstance(failed.exception(timeout=30), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        background.wait() if by == "waiting" else background.do(lambda: 3)
    assert background.do(lambda: 4).result() == 4


@pytest.mark.gpu
def test_a_host_copy_of_a_gpu_tensor_is_of_its_moment_and_is_not_waited_for():
    tensor = torch.ones(256, 256, device="cuda")
    HostCopy(tensor).get()
    torch.cuda.synchronize()
    # about half a second of work queued before the copy
    torch.cuda._sleep(1_000_000_000)
    copy = HostCopy(tensor)
    tensor.zero_()
    assert not torch.cuda.current_stream().query()
    assert float(copy.get().min()) == 1 and copy.get().is_pinned()


@pytest.fixture
def make_recorder(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Recorder]:
    """Makes the recorder of a run continued from a step; step 200 is the first to be judged."""

    def make(step: int, *loggers: str) -> Recorder:
        config = small_config(method={"decay": 0.99}, logging={"loggers": list(loggers)})
        return Recorder(
            tmp_path, config, ALONE, {}, Totals(), step=step, last_step=900, steps_per_epoch=4
        )

    return make


def record(
    recorder: Recorder, step: int, corr_DD: torch.Tensor, spread: float = 0.2, norm: float = 4.0
) -> None:
    """Record a step as the training loop does; a spread of 0.25 is healthy."""
    recorder.stepped()
    recorder.spectrum(step, corr_DD, None)
    values: dict[str, Any] = {"loss": 0.0, "probe_top1": 0.0}
    values |= {"embedding_std": spread, "embedding_norm": norm}
    recorder.training(step, values)


def corr_of(dimensions: int) -> torch.Tensor:
    """Return C, (16, 16), with an effective rank just above ``dimensions``."""
    return torch.diag(torch.tensor([1.0] * dimensions + [0.01] * (16 - dimensions)))


def test_the_loop_waits_for_no_spectrum_and_records_keep_their_order(
    make_recorder, gate, tmp_path, monkeypatch
):
    class Gated:
        """A logger that blocks at its first record, and keeps to itself what it does to records."""

        def __init__(self, run_dir: Path, config: Config, step: int) -> None:
            self.flush = self.close = lambda: None

        def log(self, record: dict[str, Any]) -> None:
            gate.wait()
            record.clear()

    monkeypatch.setitem(sys.modules, "my_loggers", SimpleNamespace(Gated=Gated))
    recorder = make_recorder(0, "my_loggers:Gated")
    for step in (1, 2, 3):
        record(recorder, step, torch.eye(16) * step)
    recorder.evaluation(3, Evaluation(0.5, 0.25))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) <= 1
    gate.set()
    recorder.flush()[1].result()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(one["step"], "loss" in one) for one in records] == [
        *((1, True), (2, True), (3, True), (3, False))
    ]
    assert [one["effective_rank"] for one in records[:3]] == [16, 16, 16]
    spectra = read_spectra(tmp_path / "spectrum.npz")
    assert {step: one.eigenvalues_D[0] for step, one in spectra.items()} == {1: 1, 2: 2, 3: 3}
    assert recorder.finding() is None
    recorder.close()


@pytest.mark.usefixtures("three_threads")
def test_records_of_a_run_on_the_cpu_take_one_core(make_recorder, monkeypatch):
    threads: list[int] = []
    asking = SimpleNamespace(flush=lambda: None, close=lambda: None)
    asking.log = lambda record: threads.append(torch.get_num_threads())
    monkeypatch.setitem(sys.modules, "my_loggers", SimpleNamespace(Asking=lambda *_: asking))
    with closing(make_recorder(0, "my_loggers:Asking")) as recorder:
        record(recorder, 1, torch.eye(16))
    assert threads == [1]


def test_the_epoch_of_a_very_early_record(small_config, tmp_path):
    totals, config = Totals(), small_config()
    with closing(
        Recorder(tmp_path, config, ALONE, {}, totals, step=0, last_step=9, steps_per_epoch=300_000)
    ) as recorder:
        record(recorder, 1, torch.eye(16))
    assert [one["epoch"] for one in read_metrics(tmp_path / "metrics.jsonl")] == [3.33333e-06]


def test_speeds_and_times_are_of_all_steps(small_config, tmp_path):
    totals, config = Totals(wall_s=1000.0, train_s=500.0), small_config()
    with closing(
        Recorder(tmp_path, config, ALONE, {}, totals, step=7, last_step=9, steps_per_epoch=4)
    ) as recorder:
        for _ in range(2):
            recorder.stepped(waited_s=1.0)
        record(recorder, 10, torch.eye(16))
        summary = recorder.summary(10, torch.eye(16), 0, "a full disk")
    (speed,) = read_metrics(tmp_path / "metrics.jsonl")
    # three steps of 64 images, of which two waited a second each
    assert speed["images_per_s"] == pytest.approx(speed["data_wait"] / 2 * 3 * 64)
    assert summary["images_per_s"] == pytest.approx(10 * 64 / 500, rel=0.01)
    assert 1000 < summary["wall_s"] < 1100


def test_the_best_evaluation_is_the_last_of_the_highest_but_never_the_first(make_recorder):
    with closing(make_recorder(0)) as recorder:
        knn = (0.9, 0.5, 0.5, 0.4)
        best = [recorder.evaluation(step, Evaluation(0.1, top1)) for step, top1 in enumerate(knn)]
        assert best == [False, True, True, False]
        assert (recorder.totals.best_step, recorder.totals.knn_top1_best) == (2, 0.5)


def test_a_collapse_that_recovers_is_forgotten(make_recorder, tmp_path):
    with closing(make_recorder(0)) as recorder:
        record(recorder, 100, corr_of(8))
        record(recorder, 200, corr_of(1), spread=0.05)
        finding = recorder.finding()
        assert finding.kind == "dimensional"
        assert recorder.flush()[0].collapse == finding.message
        record(recorder, 300, corr_of(8))
        assert recorder.finding() is None and recorder.flush()[0].collapse is None
        assert recorder.summary(300, corr_of(8), 0, "a full disk")["collapse"] is None


def test_a_continued_run_is_judged_by_its_earlier_records(make_recorder):
    with closing(make_recorder(0)) as first:
        record(first, 100, corr_of(8), spread=0.06)
        record(first, 120, corr_of(8), spread=0.06)
    with closing(make_recorder(120)) as second:
        record(second, 200, corr_of(2), spread=0.07)
        assert second.finding() is None
        record(second, 205, corr_of(2), spread=0.06)
        assert second.finding().kind == "dimensional"
        record(second, 210, corr_of(8), norm=5e3)
        assert second.finding().kind == "blow-up"
