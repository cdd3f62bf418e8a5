"""Work in processes and threads: results in order, errors unchanged, nothing left behind."""

import multiprocessing
import os
import signal

import pytest
import torch

from isofast.data.parallel import in_processes, in_threads
from isofast.errors import RunError, UserError


@pytest.mark.parametrize("spread", [in_processes, in_threads])
def test_results_come_in_order(spread):
    items = list(range(1000))
    assert list(spread(lambda k: k * k, items, 3)) == [k * k for k in items]
    assert list(spread(str, [], 3)) == []


def test_processes_are_others_where_it_pays():
    assert os.getpid() not in set(in_processes(lambda _: os.getpid(), range(100), 2))
    assert set(in_processes(lambda _: os.getpid(), range(5), 2)) == {os.getpid()}


def test_processes_have_one_core_and_leave_signals_to_the_caller():
    def found(_):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return signal.SIGINT in blocked, signal.set_wakeup_fd(-1), torch.get_num_threads()

    _, writer = pipe = os.pipe()
    os.set_blocking(writer, False)
    threads, wakeup = torch.get_num_threads(), signal.set_wakeup_fd(writer)
    torch.set_num_threads(3)
    try:
        assert set(in_processes(found, range(100), 2)) == {(True, -1, 1)}
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        torch.set_num_threads(threads)
        signal.set_wakeup_fd(wakeup)
        for end in pipe:
            os.close(end)


@pytest.mark.parametrize("spread", [in_processes, in_threads])
def test_an_error_comes_as_it_is(spread):
    def refuse(k):
        if k == 500:
            raise UserError("no 500")
        return k

    with pytest.raises(UserError, match=r"^no 500$"):
        list(spread(refuse, range(1000), 2))
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_told():
    def work(k):
        if k == 500:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunError, match=r"was killed.*memory.*data\.threads"):
        list(in_processes(work, range(1000), 2))


def test_who_takes_no_more_leaves_nothing_behind():
    results = in_processes(str, range(100_000), 2)
    assert next(results) == "0"
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []


def test_processes_end_with_the_caller():
    def outer(writer):
        results = in_processes(lambda _: os.getpid(), range(100_000), 2)
        writer.send(next(results))
        os.kill(os.getpid(), signal.SIGKILL)

    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    caller = fork.Process(target=outer, args=(writer,))
    caller.start()
    writer.close()
    assert reader.recv() != caller.pid
    # EOF: neither the caller nor its processes hold the pipe open any more
    with pytest.raises(EOFError):
        assert reader.poll(10) and reader.recv()


@pytest.mark.parametrize("seed", range(4))
def test_one_killed_in_the_middle_of_a_result_is_told(seed):
    """The result exceeds a pipe's buffer, and the caller has already read its beginning."""
    results = in_processes(lambda k: bytes(1_000_000), range(2000), 2)
    for _ in range(20 + seed):
        next(results)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="was killed"):
        list(results)
