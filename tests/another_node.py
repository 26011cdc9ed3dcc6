"""Another Ray node on this machine: ``another_node.py GCS_ADDRESS CPUS``, until it is terminated or killed.

It prints its node id. `ray start --address` refuses where everything binds to loopback
(``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``) and goes to the machine's outer address where it does not; what it calls, and
what Ray's own tests call, does neither.
"""

import signal
import sys
import threading

from ray._private.node import Node
from ray._private.parameter import RayParams

LOOPBACK = "127.0.0.1"

if __name__ == "__main__":
    parameters = RayParams(
        gcs_address=sys.argv[1],
        node_ip_address=LOOPBACK,
        num_cpus=int(sys.argv[2]),
        num_gpus=0,
        object_store_memory=150 * 1024**2,
        node_manager_port=0,
        dashboard_agent_listen_port=None,
        min_worker_port=0,
        max_worker_port=0,
        include_log_monitor=False,
    )
    node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
    sys.stdout.write(f"{node.node_id}\n")
    sys.stdout.flush()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    over.wait()
