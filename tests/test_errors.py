"""How a command ends: exit codes, and what the disk refuses."""

import errno

import pytest

from vit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Stopped,
    TrainingFailed,
    UserError,
    run_command,
    writing_to,
)


def fail(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConfigError, 2), (DataError, 2), (CheckpointError, 2), (TrainingFailed, 3), (Stopped, 75)],
)
def test_a_typed_error_is_one_line_and_its_exit_code(capsys, kind, code):
    assert run_command("vit.x", fail(kind("file: what is wrong"))) == code
    captured = capsys.readouterr()
    assert captured.err == "vit.x: file: what is wrong\n"
    assert captured.out == ""


def test_success_says_nothing(capsys):
    assert run_command("vit.x", lambda: None) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_needs_no_traceback(capsys):
    assert run_command("vit.x", fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyError("planted"), ValueError("planted"), OSError("planted")])
def test_a_bug_passes_through(error):
    with pytest.raises(type(error)) as raised:
        run_command("vit.x", fail(error))
    assert raised.value is error


def test_mistakes_of_users_are_values_that_do_not_fit():
    """Code that knows no typed errors may catch ValueError."""
    for kind in (ConfigError, DataError, CheckpointError):
        assert issubclass(kind, UserError)
        assert issubclass(kind, ValueError)
    assert not issubclass(TrainingFailed, ValueError)


def write_in(place, error, **settings):
    with writing_to(place, **settings):
        raise error


def test_what_the_disk_refuses_names_the_place_and_gives_advice():
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match=r"^/out: .*No space left on device.*; "):
        write_in("/out", full)
    with pytest.raises(ConfigError, match=r"; take another$"):
        write_in("/out", full, advice="take another")
    with pytest.raises(ConfigError, match="no number"):
        write_in("/out", OSError("no number"))


@pytest.mark.parametrize("error", [BrokenPipeError(), KeyError("planted")])
def test_a_closed_pipe_and_bugs_are_no_refusal(error):
    with pytest.raises(type(error)) as raised:
        write_in("/out", error)
    assert raised.value is error
