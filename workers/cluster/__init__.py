"""The work of this package's siblings on a Ray cluster: `neuronlens serve --ray`, `fit --ray`, `evaluate --ray`.

`connection.py` the cluster · for fits: `nodes.py` a pool of models on its nodes, `reading.py` texts through Ray Data,
`fitting.py`, `evaluation.py` what the pool is asked · for serving: `replica.py` one engine of a fleet, `launching.py`
puts a fleet on the cluster, under the `lease.py` of one process at a time, `fleet.py` answers with it, `messages.py`
what they tell each other, `scaling.py` how many there are. Importing anything of it needs Ray.
"""

import os

from workers.cluster.errors import RayMissing

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a thread of Serve that outlives a connection makes another
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what is not asked for any more is of no interest
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a default that will change

try:
    import ray as _ray  # noqa: F401
except ImportError:
    raise RayMissing("Ray is not installed; in a checkout of NeuronLens: pip install '.[ray]'") from None
