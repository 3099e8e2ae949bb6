"""The 404 of a request for a model that is not served.

All routes answer it alike: OpenAI's error body with vLLM's sentence and what may be asked for
instead. vLLM writes that itself where its own check of a request's model finds nothing; whatever
is raised ends here.
"""

from http import HTTPStatus

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from molehill.api.adapters.errors import UnknownModelError
from molehill.api.http import errors
from molehill.api.vllm.served_models import NOT_FOUND

# Ours, and what vLLM's routes understand and raise.
RAISED = (UnknownModelError, NOT_FOUND)


async def answer_unknown_model(request: Request, error: Exception) -> Response:
    """error: one of RAISED."""
    served = ", ".join(request.app.state.molehill.names.shown())
    message = f"{error} Valid aliases: {served}."
    status = HTTPStatus.NOT_FOUND
    return JSONResponse(
        errors.body(message, UnknownModelError.kind, status, param="model"), status.value
    )
