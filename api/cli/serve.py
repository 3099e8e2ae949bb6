"""`molehill serve`: splits our options from vLLM's, then hands over to the launcher."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from molehill.api.adapters.errors import RequestError
from molehill.api.adapters.store_lock import LockedError
from molehill.api.cli import arguments as values
from molehill.api.cli.arguments import TOLERANCE, Option
from molehill.api.sources.manifest import ManifestError
from molehill.api.vllm.options import ADMIN_KEY_VARIABLE, Options, admin_keys_of_environment
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.adapter.layout import LAYOUTS

USER_ERROR = 2

# As shells report a process that SIGINT ended.
INTERRUPTED = 130

SWITCH = {"action": "store_true"}
SWITCH_OFF = {"action": "store_false"}
ON_OR_OFF = {"action": argparse.BooleanOptionalAction}
COUNT = {"metavar": "N", "type": values.positive}

# By the titles of the help. What an option is called here is its field of Options, from which its
# default comes; `limits.rank` is a field of that field.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "adapters": (
        Option(
            "adapters",
            "--adapter",
            "load an adapter at start and serve it as model NAME; may be repeated",
            {"metavar": "NAME=PATH", "action": "append", "type": values.named_path},
        ),
        Option(
            "layouts",
            "--adapter-lora-b-layout",
            "how to read the LoRA on fused experts of --adapter NAME: one of "
            f"{', '.join(LAYOUTS)}; may be repeated (default: as its adapter_config.json says)",
            {"metavar": "NAME=LAYOUT", "action": "append", "type": values.named_layout},
        ),
        Option(
            "residuals",
            "--adapter-base-is-residual",
            "MODEL is the base that --adapter NAME was trained beside: what PiSSA, OLoRA or CorDA "
            "left of another, or LoftQ's quantised one; may be repeated",
            {"metavar": "NAME", "action": "append"},
        ),
        Option(
            "non_granular",
            "--adapter-non-granular-after",
            "of an X-LoRA of --adapter NAME: only the first K tokens of an answer get scalings of "
            "their own, later ones keep the last, in one pass; may be repeated (default: all)",
            {"metavar": "NAME=K", "action": "append", "type": values.named_amount},
        ),
        Option(
            "adapters_file",
            "--adapters-file",
            "serve what this JSON or YAML file says, a list of adapters or the LoRA syncer's "
            "vLLMLoRAConfig, and follow its changes; their sources as in a client's load",
            {"metavar": "PATH|URL", "type": values.path_or_url},
        ),
        Option(
            "roots",
            "--adapter-root",
            "let clients load adapters from below DIR; may be repeated (default: none)",
            {"metavar": "DIR", "action": "append", "type": values.existing_directory},
        ),
        Option(
            "store",
            "--adapter-store",
            "keep the canonical copies of loaded adapters in DIR, which belongs to this server "
            "alone and which every node must see (default: a temporary directory)",
            {"metavar": "DIR", "type": Path},
        ),
        Option(
            "backend",
            "--adapter-backend",
            "kernels that apply adapters (default: auto, the fastest that run here)",
            {"metavar": "NAME"},
        ),
        Option(
            "memory",
            "--adapter-memory",
            "for the serving copies of all adapters on one worker (default: %(default)s)",
            {"metavar": "BYTES", "type": values.positive},
        ),
        Option(
            "host_memory",
            "--adapter-host-memory",
            "for adapters that had to leave a worker and may come back, on its host; 0 for none "
            "(default: %(default)s)",
            {"metavar": "BYTES", "type": values.amount},
        ),
        Option(
            "straggler_seconds",
            "--straggler-timeout",
            "with --data-parallel-size: how long the other engines have to do what one has done; "
            "then a load is refused and taken back from all (default: %(default)s)",
            {"metavar": "SECONDS", "type": values.positive},
        ),
        Option(
            "probe",
            "--adapter-probe",
            "refuse an adapter that does not change the answer to a probe prompt (default: on)",
            ON_OR_OFF,
        ),
        Option(
            "xlora",
            "--xlora",
            "serve X-LoRA adapters too, with a second KV cache for the base's own pass: prompts "
            "have half the room, and steps with such requests run the model twice",
            SWITCH,
        ),
        Option(
            "extra_vocab",
            "--extra-vocab",
            "take adapters that add up to N tokens to the base's vocabulary; each of them has its "
            "own tokens at these ids, and nobody else has any (default: %(default)s)",
            {"metavar": "N", "type": values.amount},
        ),
        Option(
            "adapter_chat_templates",
            "--no-adapter-chat-templates",
            "chat with every adapter by the base's template, special tokens and tokenizer, without "
            "texts of tokens that it adds (default: by its own, where files beside it have others)",
            SWITCH_OFF,
        ),
    ),
    "routing that can be seen": (
        Option(
            "routing_bytes",
            "--routing-bytes",
            "for the experts that routers chose for requests that ask, on each worker, while they "
            "run; 0 for none (default: %(default)s)",
            {"metavar": "BYTES", "type": values.amount},
        ),
        Option(
            "capture_routing",
            "--capture-routing",
            "on a GPU, let requests ask for their routing: each step then keeps the gate weights "
            "of all rows, and an adapter has at most 128 router rows on a linear (on a CPU, "
            "requests may ask without it)",
            SWITCH,
        ),
    ),
    "merging": (
        Option(
            "merge",
            "--no-merge",
            "serve static parts of adapters as they are (default: as one low-rank pair)",
            SWITCH_OFF,
        ),
        TOLERANCE,
        Option(
            "merge_into_base",
            "--merge-into-base",
            "put the static part of the start adapter NAME into the base weights; all other "
            "requests subtract it again",
            {"metavar": "NAME"},
        ),
    ),
    "who may load adapters, and from where": (
        Option(
            "admin_keys",
            "--admin-api-key",
            "needed for all that changes the server, adapters first of all; may be repeated "
            f"(default: ${ADMIN_KEY_VARIABLE}, else the --api-key)",
            {"metavar": "KEY", "action": "append", "type": values.secret},
        ),
        Option(
            "hub",
            "--allow-hub",
            "let clients load adapters from Hugging Face: hf://OWNER/NAME[@REVISION]",
            SWITCH,
        ),
        Option(
            "url_prefixes",
            "--allow-url-prefix",
            "let clients load adapters from below an https, s3 or gs URL, or an http one on a "
            "network that you trust; may be repeated",
            {"metavar": "URL", "action": "append", "type": values.url_prefix},
        ),
        Option(
            "trainer_control",
            "--allow-trainer-control",
            "let whoever may load adapters pause and resume the engine and read /server_info, as "
            "reinforcement learning trainers do around a load",
            SWITCH,
        ),
        Option(
            "limits.pickles",
            "--adapter-pickles",
            "take pickled weights (adapter_model.bin) too; they are read as plain tensors only, "
            "but in the server's own process (default: on)",
            ON_OR_OFF,
        ),
        Option(
            "watch",
            "--watch-adapter-roots",
            "serve every finished directory below an --adapter-root under its name",
            SWITCH,
        ),
    ),
    "limits of all adapters": (
        Option(
            "admission.adapters",
            "--max-adapters",
            "names that may be served (default: %(default)s)",
            COUNT,
        ),
        Option(
            "admission.loads",
            "--max-adapter-loads",
            "loads at once; others are told to retry (429) (default: %(default)s)",
            COUNT,
        ),
        Option(
            "admission.upload_bytes",
            "--max-upload-bytes",
            "body of one upload to POST /v1/adapters (default: %(default)s)",
            {"metavar": "BYTES", "type": values.positive},
        ),
        Option(
            "admission.mixes",
            "--max-request-mixes",
            "mixes of adapters that requests ask for, kept at once; those not in use make room, 0 "
            "for none (default: %(default)s)",
            {"metavar": "N", "type": values.amount},
        ),
    ),
    "limits of one adapter": (
        Option(
            "limits.rank", "--max-adapter-rank", "rank of one expert (default: %(default)s)", COUNT
        ),
        Option(
            "limits.experts",
            "--max-adapter-experts",
            "experts of one site (default: %(default)s)",
            COUNT,
        ),
        Option(
            "limits.total_rank",
            "--max-adapter-total-rank",
            "ranks of one site's experts, summed (default: %(default)s)",
            COUNT,
        ),
        Option(
            "limits.adapter_bytes",
            "--max-adapter-bytes",
            "bytes of all tensors in float32 (default: %(default)s)",
            COUNT,
        ),
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Serves until stopped; 2 for what the user can put right."""
    parser = make_parser()
    if "--help" in arguments or "-h" in arguments:
        parser.print_help()
        return 0
    options, vllm_arguments = parser.parse_known_args(arguments)

    # A heavy import, and vLLM reads the environment that the launcher prepares.
    from molehill.api.vllm import launcher

    try:
        launcher.launch(from_namespace(options), vllm_arguments)
    except (launcher.LaunchError, AdapterError, RequestError, ManifestError, LockedError) as error:
        print(f"molehill serve: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Knows molehill's options only, so that help and errors need no import of vLLM."""
    parser = argparse.ArgumentParser(
        prog="molehill serve",
        usage="molehill serve MODEL [options] [any option of vllm serve]",
        description="Serve MODEL and its adapters over the OpenAI protocol.",
        epilog="All other options are vLLM's: molehill serve --help=all lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    defaults = Options()
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group, attrgetter(option.name)(defaults))
    return parser


def from_namespace(args: argparse.Namespace) -> Options:
    """What `make_parser` has parsed; an admin key may come from the environment."""
    fields: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in vars(args).items():
        part, _, field = name.rpartition(".")
        fields[part][field] = tuple(value) if isinstance(value, list) else value
    plain, defaults = fields.pop(""), Options()
    parts = {name: replace(getattr(defaults, name), **given) for name, given in fields.items()}
    options = replace(defaults, **plain, **parts)
    if options.admin_keys:
        return options
    return replace(options, admin_keys=admin_keys_of_environment())
