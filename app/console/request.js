// The request that stands under Try, and the same as a command or a program.

import { key } from "./key.js";
import { named } from "./model.js";
import { asRequest } from "./settings.js";

/** The body of POST /v1/classify. */
export function bodyOf({ text, source, concepts, settings }, layers, compare = true) {
  const body = { inputs: text, ...named };
  if (source === "chosen") body.erase = concepts.length ? { concepts, ...asRequest(settings, layers) } : [];
  if (compare) body.compare = true;
  return body;
}

// what would not show, or would turn around, where it is pasted
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g;

const json = (body, indent) => JSON.stringify(body, null, indent).replace(UNSEEN, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** A curl command; the key is left to a variable of the shell. */
export function asCurl(body) {
  const quoted = json(body).replaceAll("'", "'\\''");
  const auth = key.value ? ` -H "Authorization: Bearer $NEURONLENS_API_KEY"` : "";
  return `curl -s ${location.origin}/v1/classify${auth} -H 'Content-Type: application/json' -d '${quoted}'`;
}

/** A program in Python; the key is left to the environment. */
export function asPython(body) {
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
