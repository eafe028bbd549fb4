# SPDX-License-Identifier: Apache-2.0
"""The operator in threads and in other processes; and ten thousand calls that leak nothing."""

import concurrent.futures
import ctypes
import gc
import os

import pytest
from torch_cases import NPU_OP, OP, Case, refused, run_python, torch


# --- threads and processes ---------------------------------------------------------------------


def test_threads_share_nothing():
    cases = [Case(seed=seed, query_lengths=(5, 9), key_lengths=(300, 211)) for seed in range(4)]
    expected = [OP(*case.positional()) for case in cases]

    def work(index):
        case = cases[index % 4]
        return all(torch.equal(OP(*case.positional()), expected[index % 4]) for _ in range(20))

    for _ in range(3):  # threads come and go, with their contexts
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(32)))


def test_result_does_not_depend_on_the_number_of_threads():
    case = Case(query_lengths=(70, 3), key_lengths=(900, 2000), heads=8, sparse_count=64)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(NPU_OP(*case.tensors, **case.keywords(return_value=True)[1]))
    finally:
        torch.set_num_threads(before)
    for indices, values in results:
        assert torch.equal(indices, results[0][0]) and torch.equal(values, results[0][1])


# What forks has a process of its own: forking this one would copy the locks that threads of other
# packages hold.


class OperatorDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, seed):
        case = Case(seed=seed, query_lengths=(40, 3), key_lengths=(300, 211))
        return OP(*case.positional())


def test_works_in_data_loader_workers():
    run_python(
        """
        from test_torch_processes import OperatorDataset, torch
        dataset = OperatorDataset()
        expected = torch.stack([dataset[seed] for seed in range(8)])  # the parent has run it too
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"
        )
        assert torch.equal(torch.cat(list(loader)), expected)
        """,
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    )


def test_works_in_a_forked_child():
    run_python(
        """
        import os, torch, lightning_indexer
        torch.set_num_threads(2)
        q, k, w = torch.randn(1, 64, 4, 64).half(), torch.randn(1, 999, 1, 64).half(), torch.ones(1, 64, 4)
        # Only the operator runs in the child: torch's own parallel loops hang there.
        run = lambda: torch.ops.lightning_indexer.lightning_indexer(q, k, w).numpy().tobytes()
        expected = run()
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if run() == expected else 1)
            assert os.waitpid(child, 0)[1] == 0
        assert run() == expected
        """
    )


def test_works_in_a_forked_child_of_which_only_torch_has_used_threads():
    run_python(
        """
        import os, signal, torch, lightning_indexer
        torch.set_num_threads(2)
        q, k, w = torch.randn(1, 64, 4, 64).half(), torch.randn(1, 999, 1, 64).half(), torch.ones(1, 64, 4)
        torch.randn(4000, 1000).exp().sum()  # in parallel
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # OpenMP would wait for ever for threads that are not there
            torch.ops.lightning_indexer.lightning_indexer(q, k, w)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


# --- leaks -------------------------------------------------------------------------------------


MIB = 1 << 20  # a context has nearly 4 of them for each of its threads


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs malloc's own numbers")
def test_a_context_ends_with_its_thread_and_has_as_many_threads_as_torch():
    run_python(
        """
        import os, threading, time
        from test_torch_processes import MIB, OP, Case, bytes_in_use, torch
        case = Case(query_lengths=(1, 1), key_lengths=(3, 2), heads=1, sparse_count=2)

        def call():
            OP(*case.positional())

        def grown(work):
            before = bytes_in_use()
            work()
            return (bytes_in_use() - before) / MIB

        def tasks():
            return len(os.listdir("/proc/self/task"))

        def threads():
            before = tasks()
            for _ in range(20):
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()
            while tasks() > before:  # join does not wait for what a thread frees at its end
                time.sleep(0.01)

        torch.set_num_threads(1)
        call()
        threads()
        assert grown(threads) < 2
        torch.set_num_threads(3)
        assert 6 < grown(call) < 9  # two threads more
        torch.set_num_threads(1)
        assert grown(call) < -6
        """,
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]),
    )


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def bytes_in_use():
    """What malloc has given out, exactly; None where the C library cannot say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_in_use():
    gc.collect()
    return bytes_in_use(), resident_bytes()


def live_tensors():
    """Lists all objects to count them: not to be called between two looks at the memory."""
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("layouts", [("TND", "PA_BSND"), ("BSND", "BSND")])
def test_calls_and_refused_calls_leak_nothing(layouts):
    case = Case(layouts, query_lengths=(1, 1), key_lengths=(3, 2), heads=1, sparse_count=2)
    arguments = case.positional()
    args, kwargs = case.keywords(return_value=True)
    wrong_layout = arguments[:6] + ("layout with a name too long for a short string", "BSND", 2, 3)
    wrong_count = arguments[:8] + (0, 3)
    wrong_key = (arguments[0], arguments[1].float(), *arguments[2:])

    def calls(n):
        for _ in range(n):
            OP(*arguments)
            NPU_OP(*args, **kwargs)

    def refusals(n):
        for _ in range(n):
            refused(OP, *wrong_layout)
            refused(OP, *wrong_count)
            refused(OP, *wrong_key)
            refused(NPU_OP, *args, **{**kwargs, "pre_tokens": 1})

    for work, n in ((calls, 5000), (refusals, 2500)):
        work(300)
        holders = [t._use_count() for t in arguments if isinstance(t, torch.Tensor)]
        tensors = live_tensors()
        used, resident = memory_in_use()
        work(n)  # 10,000 calls of the operators
        used_now, resident_now = memory_in_use()
        assert live_tensors() == tensors
        assert [t._use_count() for t in arguments if isinstance(t, torch.Tensor)] == holders
        # One forgotten cell of 8 bytes a call would be 160 KB or more.
        assert used is None or used_now - used < 80_000
        assert resident_now - resident < 4 << 20
