"""The engine: requests in, answers out, one forward pass for many of them.

`admission.py` freezes plans · `masks.py` plans as tables on the device · `forward.py` one batch through trunk and
tails · `queue.py` what waits and what runs next · `engine.py` threads and replies · `metrics.py` what Prometheus sees.
"""
