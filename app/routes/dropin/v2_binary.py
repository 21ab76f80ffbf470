"""Bodies of inference requests as Triton takes them: JSON that need not be declared as such, or with binary tensors.

The binary tensor extension is what Triton's clients use unless told not to. A body is then JSON, of a length that
`Inference-Header-Content-Length` gives, and after it the elements of each BYTES input that has a `binary_data_size`:
for each its length, 4 bytes little-endian, and its bytes. `binary_tensors` makes plain JSON
of that. Replies are plain JSON in any case; those clients read both.
Source: `docs/protocol/extension_binary_data.md` of triton-inference-server/server, tritonclient 2.73.
"""

import json
import re
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

LENGTH = "inference-header-content-length"
_DATA = re.compile(r"application/(json|octet-stream|\S+\+json)")
_REPLACED = (LENGTH.encode(), b"content-type", b"content-length")


def binary_tensors(scope: Scope, receive: Receive) -> Receive:
    """Declare an inference request to be JSON, and make plain JSON of one with binary tensors as it is read.

    What a page of another origin can send without a preflight is left alone, and so refused (415) like everywhere
    else: forms, plain text, and a body without a type but with an `Origin`.
    """
    given = Headers(scope=scope)
    media_type = given.get("content-type", "").partition(";")[0].strip().lower()
    if not (_DATA.fullmatch(media_type) or (media_type == "" and "origin" not in given)):
        return receive
    length = given.get(LENGTH)
    headers = MutableHeaders(raw=[each for each in scope["headers"] if each[0] not in _REPLACED])
    headers["content-type"] = "application/json"
    scope["headers"] = headers.raw
    if length is None:
        return receive
    read = False

    async def receive_plain() -> Message:
        nonlocal read
        if read:
            return await receive()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body, more = body + message.get("body", b""), message.get("more_body", False)
        read = True
        try:
            return {"type": "http.request", "body": plain_json(body, length), "more_body": False}
        except (ValueError, RecursionError):
            raise HTTPException(400) from None

    return receive_plain


def plain_json(body: bytes, header_length: str) -> bytes:
    """A request with its binary tensors put into its JSON.

    Raises:
        ValueError: lengths or bytes do not fit, or there is no JSON.
    """
    if not header_length.isascii() or not header_length.isdecimal() or len(header_length) > 12:
        raise ValueError("the length is not a number")
    split = int(header_length)
    if split > len(body):
        raise ValueError("the body is shorter than its header")
    request = json.loads(body[:split])
    rest = memoryview(body)[split:]
    inputs = request.get("inputs") if isinstance(request, dict) else None
    for each in inputs if isinstance(inputs, list) else ():
        size = _binary_size(each)
        if size is not None:
            if size > len(rest):
                raise ValueError("fewer bytes than the sizes of the tensors")
            each["data"], rest = _texts(rest[:size]), rest[size:]
    if len(rest):
        raise ValueError("more bytes than the sizes of the tensors")
    return json.dumps(request).encode()


def _binary_size(tensor: Any) -> int | None:
    parameters = tensor.get("parameters") if isinstance(tensor, dict) else None
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None and (type(size) is not int or size < 0):
        raise ValueError("the size is not a number")
    return size


def _texts(raw: memoryview) -> list[str]:
    texts = []
    at = 0
    while at < len(raw):
        begin = at + 4
        at = begin + int.from_bytes(raw[at:begin], "little")
        if at > len(raw):
            raise ValueError("an element is cut off")
        texts.append(bytes(raw[begin:at]).decode("utf-8"))
    return texts
