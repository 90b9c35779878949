"""Serving on several machines with Ray: a stage of Ray Data and an application of Ray Serve.

Install it with ``pip install 'qlora-infer[ray]'``. docs/ray.md describes the setup of a cluster.
"""

from qlora_infer.errors import MissingDependencyError

try:
    import pyarrow as _pyarrow  # noqa: F401
    from ray import data as _data  # noqa: F401
    from ray import serve as _serve  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "qlora_infer.ray needs Ray with Ray Data and Ray Serve: pip install 'qlora-infer[ray]'"
    ) from error

from qlora_infer.ray.replica import EngineFactory
from qlora_infer.ray.server import AdapterServer, build_app
from qlora_infer.ray.stage import GenerationStage

__all__ = ["AdapterServer", "EngineFactory", "GenerationStage", "build_app"]
