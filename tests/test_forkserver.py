"""The warm parent of the tests' programs: a fork of it behaves as if started from scratch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import forkserver
import pytest
from forkserver import ForkServer
from helpers import fork_server

# Programs whose exit code, output and errors must be those of `python program.py`
PROGRAMS = {
    "end": "print('done')",
    "exit code": "import sys; sys.exit(7)",
    "exit without a code": "import sys; sys.exit()",
    "exit with text": "import sys; sys.exit('told')",
    "exit in a hurry": "import os; print('not flushed'); os._exit(9)",
    "exception": "def f():\n    raise KeyError('planted')\n\nf()\n",
    "exception with a cause": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise OSError from error"
    ),
    "syntax error": "print('no'",
    "interrupt": "raise KeyboardInterrupt",
    "own excepthook": "import sys; sys.excepthook = lambda *e: print('mine'); raise ValueError",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "closed standard output": "import sys; print('x'); sys.stdout.flush(); sys.stdout.close()",
    "atexit": "import atexit; atexit.register(print, 'last'); print('first')",
    "atexit after an error": "import atexit; atexit.register(print, 'last'); raise ValueError",
    "a thread that is waited for": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('from the thread'))).start()"
    ),
    "an error in a thread": (
        "import threading\n"
        "def f():\n    raise ValueError('in a thread')\n"
        "threading.Thread(target=f, name='worker').start()"
    ),
    "main": ("import __main__, sys\nx = 5\nprint(__name__, __main__.x, __file__ == sys.argv[0])"),
    "pickle": "import pickle\nclass A: x = 3\nprint(pickle.loads(pickle.dumps(A())).x)",
    "arguments": "import sys; print(sys.argv, sys.path[0], sys.executable)",
    "environment": "import os; print(sorted(os.environ.items()), os.getcwd())",
    "streams": (
        "import sys\n"
        "for s in sys.stdin, sys.stdout, sys.stderr:\n"
        "    print(s.fileno(), s.isatty(), s.line_buffering, s.encoding, s.errors, s.mode)"
    ),
    "standard input": "import sys; print(repr(sys.stdin.read()))",
    "descriptors": "import os; print(len(os.listdir('/proc/self/fd')))",
    "signals": (
        "import signal\n"
        "print([(n, signal.getsignal(n)) for n in sorted(signal.valid_signals())])\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.set_wakeup_fd(-1))"
    ),
    "groups": "import os; print(os.getpgrp(), os.getsid(0), os.umask(0))",
    "a disk that is full": ("import os; print('x'); os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"),
    "threads": "import threading; print(threading.active_count(), threading.current_thread().name)",
    "children": (
        "import multiprocessing as mp, os\n"
        "context = mp.get_context('fork')\n"
        "with context.Pool(2) as pool: print(pool.map(abs, [-1, -2]))\n"
        "child = context.Process(target=print, args=('child',)); child.start(); child.join()\n"
        "print(child.exitcode)"
    ),
}


@pytest.fixture
def server():
    return fork_server()


@pytest.fixture
def script(tmp_path):
    """A function that writes a program into the test's folder."""

    def write(code: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(code)
        return path

    return write


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_behaves_as_if_started_from_scratch(server, script, tmp_path, name):
    path = script(PROGRAMS[name])
    environment = {**os.environ, "A_VARIABLE": "ü"}
    (tmp_path / "input").write_text("one\ntwo ü\n")
    with open(tmp_path / "input") as file:
        fresh = subprocess.run(
            [sys.executable, str(path), "a b", "ü"],
            cwd=tmp_path,
            env=environment,
            stdin=file,
            capture_output=True,
            text=True,
            # As from a terminal: where the tests run in the background, Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    with open(tmp_path / "input") as file:
        forked = server.start(path, "a b", "ü", cwd=tmp_path, environment=environment, stdin=file)
        output, errors = forked.communicate(timeout=60)
    assert (forked.returncode, output, errors) == (fresh.returncode, fresh.stdout, fresh.stderr)


def test_a_module_behaves_as_if_started_from_scratch(server, tmp_path):
    """One that the server has imported already, and arguments that it refuses."""
    root = Path(forkserver.__file__).parents[1]
    command = ["vit.predict", "--top-k", "x"]
    fresh = subprocess.run(
        [sys.executable, "-m", *command], cwd=root, capture_output=True, text=True
    )
    forked = server.start(*command, cwd=root)
    output, errors = forked.communicate(timeout=60)
    assert (forked.returncode, output, errors) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert fresh.returncode == 2


def test_another_copy_of_the_project_has_its_own_modules(server, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "__init__.py").write_text("version = 'the copy'")
    (tmp_path / "program.py").write_text("import vit; print(vit.version)")
    process = server.start(tmp_path / "program.py", cwd=tmp_path)
    assert process.communicate(timeout=60) == ("the copy\n", "")


def test_torch_computes_with_threads_and_loader_workers(server, script, tmp_path):
    """The server has no threads that a fork would lack, and worker processes come and go."""
    path = script(
        "import multiprocessing, torch\n"
        "from torch.utils.data import DataLoader\n"
        "torch.set_num_threads(2)\n"
        "x = torch.arange(250_000.0).view(500, 500)\n"
        "assert torch.equal(x.mT @ x, (x.mT @ x))\n"
        "loader = DataLoader(torch.arange(100), batch_size=10, num_workers=2)\n"
        "print(sum(int(batch.sum()) for batch in loader), multiprocessing.active_children())\n"
    )
    process = server.start(path, cwd=tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, f"{sum(range(100))} []\n", "")
    if os.environ.get("OMP_NUM_THREADS") == "1":  # else OpenBLAS has its own, and stops them
        assert len(os.listdir(f"/proc/{server.pid}/task")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_ends_it(server, script, tmp_path, number):
    path = script("import time\nprint('here', flush=True)\ntime.sleep(60)")
    with server.start(path, cwd=tmp_path) as process:
        assert process.poll() is None
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.wait(timeout=10) == -number
        assert process.poll() == -number
        process.kill()  # of one that has ended: nothing
    assert not Path(f"/proc/{process.pid}").exists()


def test_its_handler_answers_a_signal(server, script, tmp_path):
    path = script(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('here', flush=True)\n"
        "time.sleep(60)"
    )
    process = server.start(path, cwd=tmp_path)
    process.stdout.readline()
    process.terminate()
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 75


def test_a_hanging_program_is_killed(server, script, tmp_path):
    path = script("import time\nprint('before', flush=True)\ntime.sleep(60)")
    process = server.start(path, cwd=tmp_path, new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.3)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    assert os.getpgid(process.pid) == process.pid
    process.kill()
    assert process.communicate(timeout=10) == ("before\n", "")
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()


def test_many_at_once(server, script, tmp_path):
    """Each has its own streams: one ends although another, started later, goes on."""
    path = script(
        "import sys, time\nprint(sys.argv[1])\nsys.stdin.read()\nsys.exit(int(sys.argv[1]))"
    )
    processes = [
        server.start(path, str(number), cwd=tmp_path, stdin=subprocess.PIPE) for number in range(10)
    ]
    for number, process in reversed(list(enumerate(processes))):
        assert process.poll() is None
        process.stdin.close()
        assert process.communicate(timeout=10) == (f"{number}\n", "")
        assert process.returncode == number
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    assert children.split() == []  # no zombie


def test_streams_can_be_files(server, script, tmp_path):
    path = script("import sys; print('out'); print('error', file=sys.stderr)")
    with open(tmp_path / "both", "w") as file:
        process = server.start(path, cwd=tmp_path, stdout=file, stderr=file)
        assert process.communicate(timeout=10) == (None, None)
    assert sorted((tmp_path / "both").read_text().split()) == ["error", "out"]


def test_another_environment_at_import_time_is_told(server):
    assert server.can_start({**os.environ, "RANK": "1"})
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        assert not server.can_start({**os.environ, name: "other"})


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """A server of its own, which imports nothing, for tests of its end."""
    main = tmp_path / "cold.py"
    main.write_text(
        f"import sys\nsys.path.insert(0, {str(forkserver.MAIN.parent)!r})\n"
        "import forkserver_main\n"
        "forkserver_main.import_everything = lambda: None\n"
        "forkserver_main.main()\n"
    )
    monkeypatch.setattr(forkserver, "MAIN", main)


def test_the_server_ends_with_its_client(cold, script, tmp_path):
    server = ForkServer()
    process = server.start(
        script("import sys; sys.stdin.read()"), cwd=tmp_path, stdin=subprocess.PIPE
    )
    server.close()
    with pytest.raises(RuntimeError, match="fork server has died"):
        process.wait(timeout=10)
    process.stdin.close()  # the program goes on without it, as a child without its parent does


def test_a_dead_server_is_told(cold, script, tmp_path):
    server = ForkServer()
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="fork server has died"):
        server.start(script("print()"), cwd=tmp_path)
