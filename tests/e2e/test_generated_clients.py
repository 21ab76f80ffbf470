"""Clients that public generators make of `openapi.json` compile, and classify on a server.

Both generators are downloaded: the Python one cannot be installed beside the service, since it needs an older typer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.conftest import system_program
from tests.servers import KeyedServer

pytestmark = pytest.mark.full
DOCUMENT = Path(__file__).parents[2] / "openapi.json"
TEXTS = ["a goal in the last minute", "shares fell"]
PYTHON_GENERATOR = "openapi-python-client==0.29.1"
NPM_PACKAGES = ("openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20")

PYTHON = """
import json
import sys
from generated import AuthenticatedClient
from generated.api.classify import classify
from generated.api.erasures import list_erasures, switch_on
from generated.models import ClassifyIn, Problem, SwitchOnIn

url, token, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with AuthenticatedClient(base_url=url, token=token) as client:
    on = switch_on.sync("Sports", client=client, body=SwitchOnIn(top_fraction=1.0))
    answer = classify.sync(client=client, body=ClassifyIn(inputs=texts, compare=True))
    refused = classify.sync(client=client, body=ClassifyIn(inputs=texts, erase=["Weather"]))
    assert isinstance(refused, Problem) and refused.code == "unknown_concept", refused
    assert list_erasures.sync(client=client).generation == on.generation == answer.erasure.generation
    print(json.dumps([result.to_dict() for result in answer.results]))
"""

TYPESCRIPT = """
import createClient from "openapi-fetch";
import type { components, paths } from "./generated.js";

const [url, token, texts] = process.argv.slice(2) as [string, string, string];
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${token}` } });
const on = await client.PUT("/v1/erasures/{concept}", {
  params: { path: { concept: "Sports" } },
  body: { top_fraction: 1.0 },
});
const { data, error } = await client.POST("/v1/classify", { body: { inputs: JSON.parse(texts), compare: true } });
if (error || !data) throw new Error(error?.detail);
const refused = await client.POST("/v1/classify", { body: { inputs: texts, erase: ["Weather"] } });
const problem: components["schemas"]["Problem"] | undefined = refused.error;
if (problem?.code !== "unknown_concept") throw new Error(problem?.code);
if (on.data?.generation !== data.erasure.generation) throw new Error("another generation");
const labels: string[] = data.results.map((each) => each.label);
if (labels.length !== 2) throw new Error(labels.join());
console.log(JSON.stringify(data.results));
"""


def run(folder: Path, *command: object, **environment: str) -> str:
    """Run a command in a folder; gives what it prints."""
    ended = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def check_answers(printed: str, keyed_server: KeyedServer) -> None:
    """The client printed what the server answers."""
    running, tokens = keyed_server
    headers = {"Authorization": f"Bearer {tokens['admin']}"}
    body = {"inputs": TEXTS, "compare": True}
    expected = running.http.post("/v1/classify", json=body, headers=headers).raise_for_status().json()["results"]
    assert json.loads(printed) == expected


def test_a_generated_python_client_classifies(keyed_server: KeyedServer, tmp_path: Path) -> None:
    running, tokens = keyed_server
    run(
        tmp_path,
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        tmp_path / "generator",
        PYTHON_GENERATOR,
    )
    (tmp_path / "config.yaml").write_text("post_hooks: []")  # they format the code, which takes long
    generate = [sys.executable, "-m", "openapi_python_client", "generate", "--path", DOCUMENT, "--meta", "none"]
    options = ["--output-path", tmp_path / "made" / "generated", "--config", tmp_path / "config.yaml"]
    (tmp_path / "made").mkdir()
    run(tmp_path, *generate, *options, "--fail-on-warning", PYTHONPATH=str(tmp_path / "generator"))
    use = [sys.executable, "-W", "error", "-c", PYTHON, running.url, tokens["admin"], json.dumps(TEXTS)]
    check_answers(run(tmp_path, *use, PYTHONPATH=str(tmp_path / "made")), keyed_server)


def test_a_generated_typescript_client_classifies(keyed_server: KeyedServer, tmp_path: Path) -> None:
    running, tokens = keyed_server
    system_program("node")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    run(
        tmp_path,
        system_program("npm"),
        "install",
        "--silent",
        "--no-fund",
        "--no-audit",
        "--prefix",
        tmp_path,
        *NPM_PACKAGES,
    )
    programs = tmp_path / "node_modules" / ".bin"
    # a field with a default may be left out of a request
    run(
        tmp_path,
        programs / "openapi-typescript",
        DOCUMENT,
        "--default-non-nullable=false",
        "-o",
        tmp_path / "generated.d.ts",
    )
    (tmp_path / "use.ts").write_text(TYPESCRIPT)
    run(tmp_path, programs / "tsc", "--strict", "--target", "es2022", "--module", "nodenext", tmp_path / "use.ts")
    check_answers(
        run(tmp_path, "node", tmp_path / "use.js", running.url, tokens["admin"], json.dumps(TEXTS)), keyed_server
    )
