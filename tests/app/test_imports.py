"""The application imports no machine learning: the HTTP process of a fleet must start fast and hold no model."""

import subprocess
import sys


def test_the_application_does_not_import_torch() -> None:
    code = "import sys, app.main; print(sorted({'torch', 'transformers', 'datasets', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
