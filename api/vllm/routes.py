"""What molehill's routes have in common with vLLM's."""

from fastapi import Depends
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

# Of a route that takes a body: refuses another content type as vLLM does.
json_only = [Depends(validate_json_request)]
