"""Run a function on n processes joined by gloo, as n ranks of a job would."""

import itertools
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from megaboat.engine.places import job_port

_TURNS = itertools.count()
# A server that has imported torch and DeepSpeed once forks each rank in milliseconds instead of seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def run_on_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 600.0) -> list[Any]:
    """The results of `function(ranks, *arguments)` on each of `size` ranks; raises what the first failing rank raised.

    `function` stands at the top of a module. The process group is up when it is called and gone afterwards. `timeout`
    is for a hang alone, and long enough for a machine that does much else.
    """
    port = meeting_port()
    deadline = time.monotonic() + timeout
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    with tempfile.TemporaryDirectory() as extensions:
        processes = []
        for rank, (_, sender) in enumerate(pipes):
            place = (rank, size, port, extensions)
            processes.append(CONTEXT.Process(target=_rank, args=(function, place, arguments, sender)))
            processes[-1].start()
            sender.close()
        try:
            return [_result(rank, receiver, deadline) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5 if not process.exitcode else 0)
                process.kill()


def _result(rank: int, receiver: Connection, deadline: float) -> Any:
    assert receiver.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} gave no result in time"
    try:
        value, error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    assert error is None, f"rank {rank} failed:\n{error}"
    return value


def meeting_port() -> int:
    """A free port that the kernel gives to nobody else before rank 0 listens on it."""
    while True:
        port = job_port(os.getpid(), next(_TURNS), 0)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port


def start_process(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """`function(*arguments)` in a process of its own that the caller may kill. `function` stands at a module's top."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start_commands(
    size: int, folder: Path, *arguments: str, before: tuple[Callable[..., Any], Any] | None = None
) -> list[ForkServerProcess]:
    """`megaboat ARGUMENTS` as `size` ranks that the caller may kill; what they print goes to `folder/rank-N.log`.

    `before` is a function and its argument: what a rank calls before it runs the command.
    """
    port = meeting_port()
    places = [(rank, size, port, str(folder / "extensions")) for rank in range(size)]
    processes = [CONTEXT.Process(target=_command, args=(place, folder, arguments, before)) for place in places]
    for process in processes:
        process.start()
    return processes


def _command(
    place: tuple[int, int, int, str], folder: Path, arguments: tuple[str, ...], before: tuple[Callable, Any] | None
) -> None:
    _take_place(*place)
    from megaboat.cli import main

    if before is not None:
        before[0](before[1])
    with (folder / f"rank-{place[0]}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        code = main(arguments)
    raise SystemExit(code)


def _take_place(rank: int, size: int, port: int, extensions: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": extensions,
    }


def _rank(function: Callable[..., Any], place: tuple[int, int, int, str], arguments: tuple, sender: Connection) -> None:
    _take_place(*place)
    import torch

    from megaboat.engine.deepspeed import connect
    from megaboat.engine.ranks import this_process

    torch.set_num_threads(1)
    try:
        ranks = this_process()
        connect(ranks, timeout=timedelta(seconds=300))
        _send(sender, function(ranks, *arguments), None)
        torch.distributed.destroy_process_group()
    except BaseException:
        _send(sender, None, traceback.format_exc())
        raise


def _send(sender: Connection, value: Any, error: str | None) -> None:
    sender.send_bytes(pickle.dumps((value, error)))  # a plain copy: `send` would share tensors of a process that ends
