"""The process group of a run's workers, whose ports no other machine sees that need not.

PyTorch's rendezvous store has no password, and Ray Train has rank 0 open it on every interface: whoever reaches the
machine could list its keys and write them. Here it is bound to loopback where all workers are on one node, and else to
the address by which Ray's nodes know rank 0's; so are the ports of gloo and NCCL.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from haltscale.platform.cluster import LOOPBACK


@dataclass
class PrivateTorchConfig(TorchConfig):
    """Ray Train's, but for where it listens."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _PrivateTorchBackend


class _PrivateTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        world = len(worker_group)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        places = worker_group.execute(_place)
        if len({node for node, _ in places}) == 1:
            places = [(node, LOOPBACK) for node, _ in places]
        worker_group.execute(_set_torch_distributed_env_vars)
        master = places[0][1]
        port = worker_group.execute_single(0, _listen, master) if world > 1 else 0
        joining = [
            worker_group.execute_single_async(
                rank,
                _join,
                backend=backend_config.backend or ("nccl" if gpus else "gloo"),
                address=address,
                master=(master, port),
                member=rank,
                world=world,
                timeout=timedelta(seconds=backend_config.timeout_s),
            )
            for rank, (_, address) in enumerate(places)
        ]
        ray.get(joining)


_listening: dist.TCPStore | None = None
"""Rank 0's, from when it is opened until the group is."""


def _place() -> tuple[str, str]:
    """This worker's node, and the address by which the cluster knows it."""
    return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


def _listen(address: str) -> int:
    """Open the store on one address only; its port."""
    global _listening
    bound = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = int(bound.getsockname()[1])
    _listening = dist.TCPStore(address, port, None, True, wait_for_workers=False, master_listen_fd=bound.detach())
    return port


def _join(*, backend: str, address: str, master: tuple[str, int], member: int, world: int, timeout: timedelta) -> None:
    global _listening
    if name := _interface(address):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    store: dist.Store
    if world == 1:
        store = dist.HashStore()
    elif member == 0:
        assert _listening is not None
        store, _listening = _listening, None
    else:
        store = dist.TCPStore(*master, None, False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=member, world_size=world, timeout=timeout)


def _interface(address: str) -> str | None:
    """The network interface that has an address; None where none has, as behind a translation of addresses."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    return None
