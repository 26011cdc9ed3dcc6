"""A connection to a Ray cluster. One of the few modules that import Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from haltscale.platform import cluster

cluster.prepare_client()  # before Ray is imported: it reads its environment then

import ray  # noqa: E402
import ray.data  # noqa: E402

NAMESPACE = "haltscale"


@contextlib.contextmanager
def connected() -> Iterator[dict[str, float]]:
    """A connection to a Ray cluster; gives what the cluster has in all (``CPU``, ``GPU``),
    and the memory (``node_memory``, bytes) and CPUs (``node_cpus``) of its largest nodes.

    A submitted job joins its own cluster (``RAY_ADDRESS``); other processes join the local head, or start a Ray of
    their own that ends with them.
    """
    if not ray.is_initialized():
        head = cluster.find_head() if not os.environ.get("RAY_ADDRESS") else None
        if head and not head.gcs:
            raise cluster.ClusterError(f"{head.dashboard} takes jobs only: use `haltscale submit`, or set RAY_ADDRESS")
        address = os.environ.get("RAY_ADDRESS") or (head.gcs if head else "local")
        if address == "local":
            os.environ.update(cluster.OWN_RAY)
        former = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
        if callable(former) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, former)  # Ray's own aborts the process
    quiet_ray_data()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    memory, cpus = (max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("memory", "CPU"))
    yield {**ray.cluster_resources(), "node_memory": memory, "node_cpus": cpus}


def quiet_ray_data() -> None:
    """Ray Data's progress bars and warnings drown a job's log; progress is shown by haltscale itself."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
