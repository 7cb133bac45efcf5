"""What a producer imports: `Client` blocks, `AsyncClient` awaits. Needs pyzmq and msgspec, nothing else.

with Client() as client:
    for delta in client.submit("copy: a b c", max_tokens=16):
        print(delta.text, end="")
"""

from msd.client.aio import AsyncClient, AsyncHandle
from msd.client.blocking import Client, Handle
from msd.client.connection import CurveKeys
from msd.client.failures import (
    AnswerTimeoutError,
    ClientClosedError,
    ClientFaultError,
    ForkedClientError,
    RequestError,
)
from msd.client.submits import new_request_id
from msd.errors import DaemonUnreachableError

__all__ = [
    "AnswerTimeoutError",
    "AsyncClient",
    "AsyncHandle",
    "Client",
    "ClientClosedError",
    "ClientFaultError",
    "CurveKeys",
    "DaemonUnreachableError",
    "ForkedClientError",
    "Handle",
    "RequestError",
    "new_request_id",
]
