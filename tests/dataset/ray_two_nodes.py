"""Captions a set on a Ray cluster of two local nodes, one of which dies midway.

    python tests/dataset/ray_two_nodes.py FOLDER [--killed N] ...

starts the cluster, runs `qwencli caption FOLDER --ray ADDRESS ...` on it with the fake engine, and
ends a node once there are N captions.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.dataset import fake_engine


def main() -> int:
    import ray
    from ray.cluster_utils import Cluster

    from qwencli.cli import run

    folder, killed, *more = sys.argv[1:]
    nodes = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=nodes)
    second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    hook = "tests.dataset.fake_engine.install"
    ray.init(cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": hook})
    fake_engine.install()

    def kill() -> None:
        while len(list(Path(folder).glob("*.txt"))) < int(killed):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        print("killed", flush=True)

    if int(killed):
        threading.Thread(target=kill, daemon=True).start()
    code = run(["caption", folder, "--model", "scenes", "--ray", cluster.address, *more])
    ray.shutdown()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
