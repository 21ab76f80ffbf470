"""The engine: requests in, answers out, one forward pass for many of them.

`admission.py` freezes plans · `masks.py` plans as tables on the device · `forward.py` one batch through trunk and
tails · `queue.py` what waits and what runs next · `requests.py` requests and their answers · `engine.py` the threads ·
`metrics.py` what Prometheus sees.
"""
