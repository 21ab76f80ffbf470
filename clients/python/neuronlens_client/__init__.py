"""Synchronous and asynchronous client of the NeuronLens service.

>>> from neuronlens_client import Client
>>> with Client("http://127.0.0.1:8000") as client:
...     client.classify("The coach praised the goalkeeper.", erase="Sports").label
"""

from neuronlens_client.async_client import AsyncClient
from neuronlens_client.client import Client
from neuronlens_client.erasure_context import CONTEXT, ErasureContext
from neuronlens_client.errors import (
    AccessDenied,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    NeuronLensError,
    NotFound,
    Overloaded,
    ReplicasBehind,
    ServerError,
    StaleGeneration,
    TooLarge,
    Unavailable,
    UnexpectedReply,
)
from neuronlens_client.events import Event, JobChanged, LiveChanged, OtherEvent, RangeSetsChanged
from neuronlens_client.replies import Answer, Answers, Job, LiveState, Plan, Replica, Replicas, Report, Result, Score
from neuronlens_client.request_types import Erase, ErasureSettings, ErasureSpec, FitSettings, LiveSpec

__all__ = [
    "CONTEXT",
    "AccessDenied",
    "Answer",
    "Answers",
    "AsyncClient",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Erase",
    "ErasureContext",
    "ErasureSettings",
    "ErasureSpec",
    "Event",
    "FitSettings",
    "InvalidRequest",
    "Job",
    "JobChanged",
    "LiveChanged",
    "LiveSpec",
    "LiveState",
    "NeuronLensError",
    "NotFound",
    "OtherEvent",
    "Overloaded",
    "Plan",
    "RangeSetsChanged",
    "Replica",
    "Replicas",
    "ReplicasBehind",
    "Report",
    "Result",
    "Score",
    "ServerError",
    "StaleGeneration",
    "TooLarge",
    "Unavailable",
    "UnexpectedReply",
]
