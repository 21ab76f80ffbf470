// The request of the page Try, also as a curl command and a Python program.

import { key } from "./api-key.js";
import { modelQuery } from "./model.js";
import { asRequest } from "./erasure-settings.js";

/** The body of POST /v1/classify. */
export function classifyBody({ text, source, concepts, settings }, layers, compare = true) {
  const body = { inputs: text, ...modelQuery };
  if (source === "chosen") body.erase = concepts.length ? { concepts, ...asRequest(settings, layers) } : [];
  if (compare) body.compare = true;
  return body;
}

// characters that are invisible, or change the direction of text, where it is pasted
const INVISIBLE = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g;

const json = (body, indent) => JSON.stringify(body, null, indent).replace(INVISIBLE, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** A curl command, which reads the key from an environment variable. */
export function curlCommand(body) {
  const quoted = json(body).replaceAll("'", "'\\''");
  const auth = key.value ? ` -H "Authorization: Bearer $NEURONLENS_API_KEY"` : "";
  return `curl -s ${location.origin}/v1/classify${auth} -H 'Content-Type: application/json' -d '${quoted}'`;
}

/** A Python program, which reads the key from an environment variable. */
export function pythonProgram(body) {
  const literal = python(body, "    ");
  const auth = key.value ? `    headers={"Authorization": "Bearer " + os.environ["NEURONLENS_API_KEY"]},\n` : "";
  return `${key.value ? "import os\n\n" : ""}import httpx

answer = httpx.post(
    "${location.origin}/v1/classify",
${auth}    json=${literal},
    timeout=60,
)
answer.raise_for_status()
print(answer.json()["results"][0])
`;
}

function python(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return json(value);
  if (Array.isArray(value)) return `[${value.map((each) => python(each, indent)).join(", ")}]`;
  const deeper = `${indent}    `;
  const lines = Object.entries(value).map(([name, each]) => `${deeper}${json(name)}: ${python(each, deeper)},\n`);
  return `{\n${lines.join("")}${indent}}`;
}
