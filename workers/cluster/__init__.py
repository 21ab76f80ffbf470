"""The work of this package's siblings on a Ray cluster: `neuronlens fit --ray`, `evaluate --ray`.

`nodes.py` the cluster, and a pool of models on its nodes · `reading.py` texts through Ray Data · `fitting.py`,
`evaluation.py` what the pool is asked. Importing anything of it needs Ray.
"""

import os

from workers.cluster.errors import RayMissing

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what is not asked for any more is of no interest
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a default that will change

try:
    import ray as _ray  # noqa: F401
except ImportError:
    raise RayMissing("Ray is not installed: pip install 'neuronlens[ray]'") from None
