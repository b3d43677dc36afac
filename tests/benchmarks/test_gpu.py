"""benchmarks/gpu.py goes on where it stopped, and its pieces work in miniature."""

import time

import pytest
from helpers import run

from benchmarks import gpu

TABLE = """
| model, batch | project | images/s | ours is faster by | of the ceiling | peak GiB |
|---|---|---|---|---|---|
| NAME, 512 | ours compiled | 900 |  | FRACTION | 3.0 |
| NAME, 512 | ours | 700 | 1.20 | 1% | 3.0 |
| NAME, 512 | timm compiled | 700 | 1.20 | 2% | 3.0 |
"""


@pytest.fixture
def request_(tmp_path):
    return gpu.Request(tmp_path)


def fake_pieces(monkeypatch, **scripts):
    """Let the pieces be these Python programs; returns the names in the order of their calls."""
    calls = []
    made = {
        name: gpu.Piece(name, ["-c", script, "OUT"], minutes=0, writes=False)
        for name, script in scripts.items()
    }
    measure = gpu.run_piece

    def noted(piece, out, end):
        calls.append(piece.name)
        return measure(piece, out, end)

    monkeypatch.setattr(gpu, "pieces", lambda request: made)
    monkeypatch.setattr(gpu, "run_piece", noted)
    return calls


def test_what_is_finished_is_not_measured_again(request_, monkeypatch):
    calls = fake_pieces(
        monkeypatch, first="print('one')", second="import sys; sys.exit(3)", third="print('three')"
    )
    end = time.monotonic() + 60
    code, failed = gpu.run_pieces(request_, ["first", "second", "third"], end)
    assert code == 1
    assert len(failed) == 1
    assert failed[0].startswith("second failed, exit code 3")
    assert (request_.out / "first.md").read_text() == "one\n"
    assert not (request_.out / "second.md").exists()
    gpu.run_pieces(request_, ["first", "second", "third"], end)
    assert calls == ["first", "second", "third", "second"]
    gpu.run_pieces(request_, ["first"], end, again=True)
    assert calls[-1] == "first"


def test_a_piece_that_failed_comes_after_the_others_in_the_next_call(request_, monkeypatch):
    flag = request_.out / "flag"
    fails = f"import os, sys; print('x'); sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    calls = fake_pieces(monkeypatch, first=fails, second="import sys; sys.exit(75)")
    names = ["first", "second"]
    assert gpu.run_pieces(request_, names, time.monotonic() + 60)[0] == gpu.STOPPED
    assert (request_.out / "first.failed").read_text() == "x\n"
    assert gpu.run_pieces(request_, names, time.monotonic() + 60)[0] == gpu.STOPPED
    # The second has more to do, and the first took none of its time
    assert calls == ["first", "second", "second"]
    flag.touch()
    assert gpu.run_pieces(request_, ["first"], time.monotonic() + 60)[0] == 0
    assert not (request_.out / "first.failed").exists()


def test_a_piece_that_fails_before_it_writes_is_noted(request_, monkeypatch):
    piece = gpu.Piece("broken", ["-c", "import sys; sys.exit(4)"], minutes=0)
    monkeypatch.setattr(gpu, "pieces", lambda request: {"broken": piece})
    code, failed = gpu.run_pieces(request_, ["broken"], time.monotonic() + 60)
    assert (code, len(failed)) == (1, 1)
    assert (request_.out / "broken.failed").exists()


def test_where_the_next_piece_is_too_long_a_shorter_one_is_measured(request_, monkeypatch):
    made = {
        "long": gpu.Piece("long", ["-c", "print('long')"], minutes=5, writes=False),
        "short": gpu.Piece("short", ["-c", "print('short')"], minutes=0, writes=False),
    }
    monkeypatch.setattr(gpu, "pieces", lambda request: made)
    end = time.monotonic() + 60
    assert gpu.run_pieces(request_, list(made), end) == (gpu.STOPPED, [])
    assert [path.name for path in request_.out.glob("*.md")] == ["short.md"]


def test_what_a_piece_printed_is_kept_where_it_is_stopped(request_, monkeypatch):
    fake_pieces(monkeypatch, slow="import time; print('begun'); time.sleep(60)")
    assert gpu.run_pieces(request_, ["slow"], time.monotonic() + 2) == (gpu.STOPPED, [])
    assert (request_.out / "slow.part").read_text() == "begun\n"


def test_what_a_piece_has_started_does_not_outlive_it(request_, monkeypatch):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(40)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    fake_pieces(monkeypatch, starts=starts)
    monkeypatch.setattr(gpu, "STOPPING_SECONDS", 1)
    begun = time.monotonic()
    assert gpu.run_pieces(request_, ["starts"], begun + 3) == (gpu.STOPPED, [])
    assert time.monotonic() - begun < 20


def test_a_piece_is_not_begun_without_its_minutes(request_, monkeypatch):
    calls = fake_pieces(monkeypatch, first="print('one')")
    assert gpu.run_pieces(request_, ["first"], time.monotonic() - 1) == (gpu.STOPPED, [])
    assert not calls


def test_a_piece_that_is_stopped_or_has_more_to_do_is_no_failure(request_, monkeypatch):
    fake_pieces(monkeypatch, slow="import time; time.sleep(60)", more="import sys; sys.exit(75)")
    end = time.monotonic() + 2
    assert gpu.run_pieces(request_, ["slow"], end) == (gpu.STOPPED, [])
    end = time.monotonic() + 60
    assert gpu.run_pieces(request_, ["more"], end) == (gpu.STOPPED, [])
    assert not list(request_.out.glob("*.md"))


def test_the_first_and_the_slowest_are_profiled(request_):
    assert "--size" not in gpu.pieces(request_)["profiles"].command
    for name, fraction in (("vit_s16", "50%"), ("vit_b16", "64%"), ("vit_ti4", "31%")):
        table = TABLE.replace("NAME", name).replace("FRACTION", fraction)
        (request_.out / f"steps_{name}.md").write_text(table)
    command = gpu.pieces(request_)["profiles"].command
    assert command[1:5] == ["--size", "vit_s16", "--size", "vit_ti4"]


def test_all_that_is_asked_for_is_measured(request_):
    made = gpu.pieces(request_)
    assert list(made) == [
        "tests",
        "kernels",
        *(f"steps_{size}" for size in ("vit_s16", "vit_b16", "vit_l16", "vit_s4", "vit_ti4")),
        "input",
        "profiles",
        "recipes",
    ]
    assert all(piece.minutes < 9.5 for piece in made.values())


@pytest.mark.slow
def test_pieces_in_miniature(tmp_path):
    # But for the steps, of which compiling the contestants takes a minute
    names = ["tests", "kernels", "input", "profiles"]
    chosen = [word for name in names for word in ("--piece", name)]
    done = run("benchmarks/gpu.py", "--miniature", "--out", str(tmp_path), *chosen, cwd=tmp_path)
    # Compilers may be missing, which is said in the table
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {name: (tmp_path / f"{name}.md").read_text() for name in names}
    assert "test_every_optimizer[muon] PASSED" in tables["tests"]
    assert " passed" in tables["tests"]
    assert "attention (2, 2, 17, 16)" in tables["kernels"]
    assert "nvJPEG" in tables["input"]
    assert "ms a step" in tables["profiles"]
