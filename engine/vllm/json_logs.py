"""Where vLLM logs JSON, so do the libraries that log to nobody, and Python's warnings."""

import logging


def install() -> None:
    """In this process, once vLLM has configured its logger; before that, nothing happens."""
    root = logging.getLogger()
    handlers = [
        handler
        for handler in logging.getLogger("vllm").handlers
        if type(handler.formatter).__module__.startswith("pythonjsonlogger")
    ]
    # Without a handler Python prints their warnings bare.
    if handlers and not root.handlers:
        root.handlers = handlers
        logging.captureWarnings(True)
