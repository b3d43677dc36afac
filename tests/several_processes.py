"""Starting a script as all processes of a group, as torchrun would."""

from pathlib import Path

from helpers import Program, start
from torch.distributed import TCPStore


def store_of_group() -> tuple[TCPStore, dict[str, str]]:
    """A store by which processes find each other, for as long as it is referred to, and where.

    As torchrun's agent does, this process hosts it: a port that is only found to be free may be
    another's by the time that the first process of the group has been started.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def start_ranks(
    count: int, script: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> list[Program]:
    """Start a script as all processes of a group, with the variables that torchrun would set."""
    store, address = store_of_group()
    group = {
        **(env or {}),
        **address,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    programs = [start(script, *arguments, cwd=cwd, env=environment) for environment in environments]
    for program in programs:
        program.store = store  # lives as long as they do
    return programs


def finish_ranks(processes: list[Program], code: int = 0) -> list[str]:
    """What each wrote to standard output and standard error; fails for another exit code."""
    texts = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == code, errors[-3000:]
        texts.append(output + errors)
    return texts
