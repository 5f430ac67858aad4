"""`moe-replay serve`: a rollout server, on this machine's loopback unless told otherwise.

In: options. Out: an exit code. Called by: cli.main.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import Any

from moe_replay.errors import RecipeError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--engine", choices=("vllm", "embedded"), default="vllm")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--token-file",
        type=Path,
        help="file with the bearer token that callers must send; required off loopback",
    )
    parser.add_argument("--max-batch-size", type=int, default=128, help="sequences sampled at once")
    parser.add_argument(
        "--max-context-length", type=int, help="most tokens, prompt and completion; the model's own"
    )
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1.0, help="memory of vLLM's key-value cache"
    )
    parser.add_argument(
        "--no-record-routes", action="store_true", help="record no routes; R3 is impossible then"
    )


def run_serve(options: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    from moe_replay.cli.environment import set_defaults
    from moe_replay.rollout.bearer import exposure, read_token

    token = read_token(options.token_file)
    if warning := exposure(options.token_file):
        print(warning, file=sys.stderr)
    check_exposure(options.host, token)
    set_defaults(os.environ)
    engine = _engine(options)
    try:
        import uvicorn

        from moe_replay.rollout.server import EngineServer

        server = EngineServer(engine, concurrent=options.engine == "vllm", token=token)
        print(f"serving {options.model} on http://{options.host}:{options.port}", file=sys.stderr)
        uvicorn.run(
            server.application(),
            host=options.host,
            port=options.port,
            log_level="warning",
            ws="none",
        )
    finally:
        engine.close()
    return 0


def check_exposure(host: str, token: str | None) -> None:
    """Raise `RecipeError` when a server would be reachable from other machines without a token."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and token is None:
        raise RecipeError(
            f"--host {host} can be reached from other machines, and whoever reaches the server can replace its weights: "
            "give --token-file, or listen on 127.0.0.1"
        )


def _engine(options: argparse.Namespace) -> Any:
    sizes = {
        "dtype": options.dtype,
        "max_batch_size": options.max_batch_size,
        "record_routes": not options.no_record_routes,
    }
    if options.engine == "embedded":
        from moe_replay.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(options.model, **sizes)
    from moe_replay.rollout.checkpoint_files import check_finite
    from moe_replay.rollout.vllm_engine import VllmEngine

    # The embedded engine looks at what it has loaded; vLLM would answer every request with an error.
    check_finite(options.model)
    return VllmEngine(
        options.model,
        max_context_length=options.max_context_length,
        kv_cache_gib=options.kv_cache_gib,
        **sizes,
    )
