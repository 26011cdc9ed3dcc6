"""Ray: evaluations of several models, corpora and tasks, spread over a cluster.

One of the few modules that import Ray. Spread are the parts of an :class:`Evaluation`, which also run without Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from haltscale.platform import cluster

cluster.prepare_client()  # before Ray is imported: it reads its environment then

import ray  # noqa: E402
import torch  # noqa: E402

from haltscale.platform.evaluation.evaluation_jobs import Evaluation  # noqa: E402
from haltscale.platform.ray_connection import connected  # noqa: E402

ENVIRONMENT = ("HALTSCALE_HOME", "HALTSCALE_CORPORA", "HALTSCALE_TASKS")
"""What the parts need of this process's environment: where corpora and tasks are."""


def spread(
    evaluations: Sequence[Evaluation], *, cpus: int = 1
) -> Iterator[tuple[Evaluation, list[tuple[str, dict[str, Any]]]]]:
    """Every part and its results, in order, computed side by side: on the cluster that this process belongs to, on the
    local head, or on a Ray of its own.

    Args:
        cpus: of each part, which computes with as many threads.

    Raises:
        ValueError: as :meth:`Evaluation.results` does; the other parts continue until this process ends.
        ClusterError: the head takes jobs only.
    """
    with connected():
        variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        parts = [part for evaluation in evaluations for part in evaluation.parts()]
        work = ray.remote(_results)
        pending = [
            work.options(
                num_cpus=cpus,
                num_gpus=1 if part.device.startswith("cuda") else 0,
                runtime_env={"env_vars": variables},
                max_retries=3,  # a node may die
            ).remote(part, cpus)
            for part in parts
        ]
        try:
            for part, result in zip(parts, pending, strict=True):
                yield part, ray.get(result)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        # Other parts are left alone, not cancelled: Ray 2.60 aborts a process whose cancelled tasks end all the same
        # ("Tried to complete task that was not pending").


def _results(part: Evaluation, threads: int) -> list[tuple[str, dict[str, Any]]]:
    torch.set_num_threads(threads)
    return list(part.results())
