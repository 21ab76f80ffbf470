"""`POST /`: text classification as a Hugging Face Inference Endpoint answers it.

Shapes: the text-classification task of huggingface_hub 2.4 (`InferenceClient.text_classification`, which posts to the
URL itself and takes element 0 of a list of lists), and the pipeline of transformers that such endpoints run.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from app.answering import Timeout, activation_of, answer_to, ranked
from app.auth import Calling
from app.problems import BODY, Problem, documented
from app.replies import Score
from app.requests import Inputs, erasures_of
from app.routes import Serving
from app.routes.dropin.dialect import Dialect
from app.routes.dropin.steering import TOLD, Steered, tell


class HfProblem(Problem):
    """An error as clients of Hugging Face read it."""

    error: str | None = Field(None, description="The same as `detail`.")


def _say(problem: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return problem["status"], {"error": problem["detail"]}


DIALECT = Dialect(HfProblem, _say)
router = APIRouter(tags=["Hugging Face"], responses={500: {"model": HfProblem}})


class HfParameters(Steered):
    """How to classify; what is unknown here is ignored."""

    top_k: Annotated[int, Field(ge=1)] | None = Field(None, description="Best labels to give; null: all.")
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="null: what the model was made for."
    )
    truncation: bool | None = Field(None, description="false: a text that is too long is an error.")


class HfIn(Steered):
    """Texts to classify."""

    inputs: Inputs = Field(description="One text, or several.")
    parameters: HfParameters | None = None


@router.post("/", responses=documented(*BODY, 404, 422, 429, 503, 504) | TOLD)
async def huggingface_classify(
    request: Request,
    response: Response,
    body: HfIn,
    service: Serving,
    caller: Calling,
    x_request_timeout: Timeout = None,
) -> list[list[Score]]:
    """Classify as a Hugging Face Inference Endpoint does: each text's labels, best first."""
    chosen = body.parameters or HfParameters()
    answer = await answer_to(
        request,
        service,
        caller,
        [body.inputs] if isinstance(body.inputs, str) else body.inputs,
        erasures_of(body.erase if body.erase is not None else chosen.erase),
        truncate=chosen.truncation is not False,
        timeout=x_request_timeout,
    )
    tell(response, answer)
    activation = chosen.function_to_apply or activation_of(service.model.problem_type)
    logits = [text.logits for text in answer.texts]
    return ranked(logits, service.model.identity.labels, activation, chosen.top_k)
