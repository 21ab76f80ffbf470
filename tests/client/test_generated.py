"""The synchronous client is generated from the asynchronous one."""

import runpy
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "clients" / "python"


def test_the_generated_client_is_up_to_date() -> None:
    script = runpy.run_path(str(CLIENT / "generate_sync.py"))
    assert script["TARGET"].read_text("utf-8") == script["generated"](), "run python clients/python/generate_sync.py"
