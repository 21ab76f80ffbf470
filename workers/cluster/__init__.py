"""The work of the sibling packages on a Ray cluster: `neuronlens serve --ray`, `fit --ray` and `evaluate --ray`.

`connection.py` connects to a cluster. Fits and evaluations: `model_pool.py` has models on the nodes, `corpus_files.py`
reads texts, `fitting.py` and `evaluation.py` say what the pool does. Serving: `replica.py` is one engine of a fleet,
`plan.py` describes a fleet, `launching.py` starts it, `fleet.py` answers with it. Importing any of it needs Ray.
"""

import os

from workers.cluster.errors import RayMissing

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anybody
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a thread of Serve reconnects after a connection is closed
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # results of cancelled work are not fetched
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a default that will change

try:
    import ray as _ray  # noqa: F401
except ImportError:
    raise RayMissing("Ray is not installed; in a checkout of NeuronLens: pip install '.[ray]'") from None
