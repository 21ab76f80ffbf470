"""LitServe with its batching, as its documentation shows it.

python lit.py MODEL PORT THREADS
"""

import sys
from typing import Any

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        torch.set_num_threads(int(sys.argv[3]))
        self.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        self.model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()

    def decode_request(self, request: dict[str, Any]) -> list[str]:
        texts: list[str] = request["inputs"]
        return texts

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, requests: list[list[str]]) -> list[list[int]]:
        texts = [text for request in requests for text in request]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            labels = iter(self.model(**batch).logits.argmax(dim=-1).tolist())
        return [[next(labels) for _ in request] for request in requests]

    def unbatch(self, output: list[list[int]]) -> list[list[int]]:
        return output

    def encode_response(self, output: list[int]) -> dict[str, list[int]]:
        return {"labels": output}


if __name__ == "__main__":
    per_request = int(sys.argv[4])
    api = Classifier(max_batch_size=max(1, 32 // per_request), batch_timeout=0.01, api_path="/classify")
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
