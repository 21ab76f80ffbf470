"""The engine: requests in, answers out, one forward pass for many of them.

`answers.py` the engine as others see it · `admission.py` freezes plans, `generation_wait.py` waits for a generation ·
`requests.py` work under way · `engine.py` the threads · `scheduler.py` what waits, in `queue.py` · `runner.py` one
batch through trunk and tails · `inspector.py` tokens and states · `metrics.py` what Prometheus sees.
"""
