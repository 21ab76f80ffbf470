"""What the HTTP side costs to have: a process before a fleet must start in a second, and hold no model."""

import subprocess
import sys


def test_the_application_is_there_without_torch() -> None:
    code = "import sys, app.main; print(sorted({'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
