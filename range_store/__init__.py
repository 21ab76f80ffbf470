"""The domain of NeuronLens in numpy, and its storage in Redis, without torch and HTTP.

`domain`: erasures, ranges, rankings, plans, range sets, the live state. `storage`: all of it in Redis. `embedded`: a
private Redis for a directory. `errors`: the errors of this package.
"""
