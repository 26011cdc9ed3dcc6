"""Where the processes of a group listen; a whole study of two workers is in tests/ray."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from multiprocessing.connection import Connection

import psutil
import torch
import torch.distributed as dist

from haltscale.platform.runs.ray_process_group import _interface, _join, _listen


def member(rank: int, pipe: Connection) -> None:
    """One of two that add numbers up; tells the sum and the addresses on which it listens."""
    if rank == 0:
        pipe.send(_listen("127.0.0.1"))
    port = pipe.recv()
    _join(
        backend="gloo",
        address="127.0.0.1",
        master=("127.0.0.1", port),
        member=rank,
        world=2,
        timeout=timedelta(seconds=60),
    )
    number = torch.tensor([rank + 1.0])
    dist.all_reduce(number)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    pipe.send((number.item(), [c.laddr.ip.removeprefix("::ffff:") for c in listening]))
    pipe.recv()
    dist.destroy_process_group()


def test_rendezvous_and_collectives_listen_on_loopback_only():
    start = multiprocessing.get_context("spawn")
    pipes = [start.Pipe() for _ in range(2)]
    members = [start.Process(target=member, args=(rank, pipe[1])) for rank, pipe in enumerate(pipes)]
    try:
        for process in members:
            process.start()
        port = pipes[0][0].recv()
        for ours, _ in pipes:
            ours.send(port)
        (total, first), (other, second) = [ours.recv() for ours, _ in pipes]
        for ours, _ in pipes:
            ours.send("enough")
    finally:
        for process in members:
            process.join(30)
            process.kill()
    assert total == other == 3.0
    assert len(first) >= 2, "the store and gloo"
    assert {*first, *second} == {"127.0.0.1"}


def test_the_interface_of_an_address_is_found():
    assert _interface("127.0.0.1") in psutil.net_if_addrs()
    assert _interface("192.0.2.1") is None, "an address for examples, which no machine has"
