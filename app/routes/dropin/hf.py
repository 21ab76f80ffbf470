"""`POST /`: text classification as a Hugging Face Inference Endpoint answers it.

Shapes: the text-classification task of huggingface_hub 2.4 (`InferenceClient.text_classification`, which posts to the
URL itself and takes element 0 of a list of lists), and the pipeline of transformers that such endpoints run.
"""

from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.http.problems import Dialect, Problem
from app.http.responses import BODY
from app.http.routing import Router
from app.routes.dependencies import ServiceDep
from app.routes.dropin.steering import STEERING_HEADERS, Loose, Steered, set_headers
from app.schemas.replies import Score
from app.schemas.requests import erasures_of
from app.schemas.unions import LIST, OBJECT, TEXT, by_shape
from app.security.auth import CallerDep
from app.serving.classification import MinGeneration, Timeout, answer_to, ranked
from app.serving.service import TextOrPair


class HfProblem(Problem):
    """An error as clients of Hugging Face read it."""

    error: str | None = Field(None, description="The same as `detail`.")


def _translate(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return problem["status"], {"error": problem["detail"]}


DIALECT = Dialect("hugging-face", HfProblem, _translate)
OTHER_TASKS = {
    "zero-shot-classification": ("candidate_labels", "hypothesis_template", "multi_label"),
    "token-classification": ("aggregation_strategy", "ignore_labels", "stride"),
    "fill-mask": ("targets",),
    "text-generation": (
        "adapter_id",
        "best_of",
        "decoder_input_details",
        "details",
        "do_sample",
        "frequency_penalty",
        "grammar",
        "max_new_tokens",
        "repetition_penalty",
        "return_full_text",
        "seed",
        "stop",
        "temperature",
        "top_n_tokens",
        "top_p",
        "typical_p",
        "watermark",
    ),
    "summarization": ("clean_up_tokenization_spaces", "generate_parameters"),
    "translation": ("src_lang", "tgt_lang"),
    "text-to-speech": ("generation_parameters",),
    "text-to-image": ("guidance_scale", "height", "negative_prompt", "num_inference_steps", "scheduler", "width"),
}
"""Parameters of other tasks that take a text: classifying it would not be what their clients ask for."""
router = Router("Hugging Face", dialects=(DIALECT,), strict_query=False)


class HfParameters(Steered):
    """How to classify. Unknown parameters are ignored, except those of another task, which are errors."""

    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="Best labels to give; null: all.")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="null: what the model was made for."
    )
    truncation: bool | None = Field(None, description="false: a text that is too long is an error.")

    @model_validator(mode="before")
    @classmethod
    def _of_this_task(cls, value: Any) -> Any:
        for task, names in OTHER_TASKS.items() if isinstance(value, dict) else ():
            if named := [name for name in names if value.get(name) is not None]:
                raise PydanticCustomError(
                    "other_task",
                    "`{name}` belongs to the task {task}, and this server supports text-classification only",
                    {"name": named[0], "task": task},
                )
        return value


class HfText(Loose):
    """A text, or a pair of texts."""

    text: str
    text_pair: str | None = Field(None, description="The second text of a pair; null or empty: there is none.")


OneInput = Annotated[
    Annotated[str, TEXT] | Annotated[HfText, OBJECT], by_shape("a text or an object with text and text_pair")
]
HfInputs = Annotated[
    Annotated[str, TEXT] | Annotated[HfText, OBJECT] | Annotated[list[OneInput], Field(fail_fast=True), LIST],
    by_shape("a text, an object with text and text_pair, or a list of those"),
]


class HfIn(Steered):
    """Texts, or pairs of texts, to classify."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"inputs": "The striker scored twice.", "parameters": {"top_k": 2}},
                {"inputs": [{"text": "A goal.", "text_pair": "Somebody scored."}], "erase": ["Sports"]},
            ]
        }
    )

    inputs: HfInputs = Field(description="One text or pair, or several.")
    parameters: HfParameters | None = None

    def texts(self) -> list[TextOrPair]:
        """The texts and pairs, one or many."""
        given = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [_text_or_pair(each) for each in given]


def _text_or_pair(each: str | HfText) -> TextOrPair:
    """The text, or the pair; an empty second text is none, as in transformers' pipeline."""
    if isinstance(each, str):
        return each
    return (each.text, each.text_pair) if each.text_pair else each.text


@router.operation(
    "POST", "/", key_scope="infer", errors=(*BODY, 404, 422, 429, 503, 504), responses=STEERING_HEADERS, classifies=True
)
async def huggingface_classify(
    request: Request,
    response: Response,
    body: HfIn,
    service: ServiceDep,
    caller: CallerDep,
    x_request_timeout: Timeout = None,
    min_generation: MinGeneration = None,
) -> list[list[Score]]:
    """Classify as a Hugging Face Inference Endpoint does: the labels of each text or pair, best first."""
    chosen = body.parameters or HfParameters()
    answer = await answer_to(
        request,
        service,
        caller,
        body.texts(),
        erasures_of(body.erase if body.erase is not None else chosen.erase),
        truncate=chosen.truncation is not False,
        timeout=x_request_timeout,
        min_generation=min_generation,
    )
    set_headers(response, answer)
    activation = chosen.function_to_apply or service.model.activation
    logits = [text.logits for text in answer.texts]
    return ranked(logits, service.model.identity.labels, activation, chosen.top_k)
