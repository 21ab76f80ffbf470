"""The engine: requests in, answers out, one forward pass for many of them.

`answers.py` answers, and the engine as others see it · `admission.py` freezes plans · `masks.py` plans as tables on the
device · `forward.py` one batch through trunk and tails · `queue.py` what waits and what runs next · `requests.py` what
is under way · `engine.py` the threads · `looking.py` tokens and states, by `errands.py` · `metrics.py` what Prometheus
sees.
"""
