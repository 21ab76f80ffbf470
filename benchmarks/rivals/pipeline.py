"""What most people write first: FastAPI, and a transformers pipeline called in each request.

python pipeline.py MODEL PORT THREADS
"""

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

torch.set_num_threads(int(sys.argv[3]))
classifier: Any = pipeline("text-classification", model=sys.argv[1], device="cpu")
app = FastAPI()


class Request(BaseModel):
    inputs: list[str]


@app.post("/classify")
def classify(request: Request) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = classifier(request.inputs, truncation=True, max_length=512)
    return answers


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
