"""Generate `neuronlens_client/client.py` from `async_client.py`: `python clients/python/generate_sync.py`.

Lines that end in "# async only" are left out, `REPLACEMENTS` are made, and ruff formats the result.
"""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "neuronlens_client"
SOURCE, TARGET = PACKAGE / "async_client.py", PACKAGE / "client.py"
REPLACEMENTS = (
    (r"\A.*\n", '"""The synchronous client. Generated from async_client.py by generate_sync.py: do not edit."""\n'),
    (r"(?m)^.*# async only\n", ""),
    (r"(?m)^ +concurrency: .*\n", ""),
    (r"(?m)^import asyncio\n", ""),
    (r"An asynchronous client", "A synchronous client"),
    (r"Concurrent tasks", "Threads"),
    (r"\bawait gather\((\w+), self\._concurrency\)", r"[call() for call in \1]"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\bAsync(Client|Iterator)\b", r"\1"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\ba(close|connect_sse|iter_sse|read)\b", r"\1"),
)


def generated() -> str:
    """The text of `client.py`."""
    text = SOURCE.read_text("utf-8")
    for pattern, replacement in REPLACEMENTS:
        text = re.sub(pattern, replacement, text)
    for options in (["check", "--select=I", "--fix", "--quiet"], ["format"]):
        command = [sys.executable, "-m", "ruff", *options, f"--stdin-filename={TARGET}", "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(generated(), "utf-8")
