"""Starting a script as all processes of a group, as torchrun would."""

import socket
from pathlib import Path

from helpers import Program, start


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_ranks(count: int, script: str, *arguments: str, cwd: Path) -> list[Program]:
    """Start a script as all processes of a group, with the variables that torchrun would set."""
    group = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(script, *arguments, cwd=cwd, env=environment) for environment in environments]


def finish_ranks(processes: list[Program], code: int = 0) -> list[str]:
    """What each wrote to standard output and standard error; fails for another exit code."""
    texts = []
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == code, errors[-3000:]
        texts.append(output + errors)
    return texts
