"""A client of the NeuronLens service: it needs httpx and pydantic, and nothing of the service itself.

>>> from neuronlens import Client
>>> with Client("http://127.0.0.1:8000") as client:
...     client.classify("The coach praised the goalkeeper.", erase="Sports").label
"""

from neuronlens.async_client import AsyncClient
from neuronlens.client import Client
from neuronlens.erasing import CONTEXT, Erase, Erasing, ErasureSettings, ErasureSpec, LiveSpec
from neuronlens.errors import (
    Conflict,
    DeadlineExceeded,
    Failed,
    Invalid,
    NeuronLensError,
    NoAnswer,
    NotEverywhere,
    NotFound,
    NotUnderstood,
    Overloaded,
    Refused,
    Stale,
    TooLarge,
    Unavailable,
)
from neuronlens.events import Event, JobChanged, LiveChanged, OtherEvent, RangeSetsChanged
from neuronlens.fitting import FitSettings
from neuronlens.replies import Answer, Answers, Job, LiveState, Plan, Replica, Replicas, Report, Result, Score

__all__ = [
    "CONTEXT",
    "Answer",
    "Answers",
    "AsyncClient",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "Erase",
    "Erasing",
    "ErasureSettings",
    "ErasureSpec",
    "Event",
    "Failed",
    "FitSettings",
    "Invalid",
    "Job",
    "JobChanged",
    "LiveChanged",
    "LiveSpec",
    "LiveState",
    "NeuronLensError",
    "NoAnswer",
    "NotEverywhere",
    "NotFound",
    "NotUnderstood",
    "OtherEvent",
    "Overloaded",
    "Plan",
    "RangeSetsChanged",
    "Refused",
    "Replica",
    "Replicas",
    "Report",
    "Result",
    "Score",
    "Stale",
    "TooLarge",
    "Unavailable",
]
