"""`moe-replay serve`: a rollout server, by default on the loopback of this machine."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_replay.errors import RecipeError

if TYPE_CHECKING:
    from moe_replay.checkpoint.facts import ModelFacts
    from moe_replay.engines.serve.engine import ServedEngine


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--engine", choices=("vllm", "embedded"), default="vllm")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--no-record-routes", action="store_true", help="record no routes, which rules out R3"
    )
    parser.add_argument("--max-batch-size", type=int, default=128, help="sequences sampled at once")
    parser.add_argument(
        "--max-model-len",
        "--max-context-length",
        dest="max_context_length",
        metavar="N",
        type=int,
        help="maximum tokens of prompt and completion; default: the model's own",
    )
    parser.add_argument(
        "--tensor-parallel-size", metavar="N", type=int, default=1, help="GPUs that share the model"
    )
    parser.add_argument(
        "--data-parallel-size", metavar="N", type=int, default=1, help="copies of the model"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        metavar="FRACTION",
        type=float,
        help="fraction of a GPU's memory that vLLM uses; default: vLLM's own",
    )
    parser.add_argument(
        "--kv-cache-gib",
        metavar="GIB",
        type=float,
        help="memory of the key-value cache; default: what --gpu-memory-utilization leaves",
    )
    parser.add_argument(
        "--weights-dir",
        metavar="DIR",
        type=Path,
        help="folder for pushed weights, at most two copies; default: /dev/shm, which is memory",
    )
    _add_access_options(parser.add_argument_group("who may call"))


def _add_access_options(listen: argparse._ArgumentGroup) -> None:
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on")
    listen.add_argument("--port", type=int, default=8000)
    listen.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="file with the bearer token that callers must send; required off loopback",
    )
    listen.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name that callers may use for this machine; addresses are always allowed",
    )
    listen.add_argument("--ssl-certfile", metavar="FILE", type=Path, help="certificate: serve TLS")
    listen.add_argument("--ssl-keyfile", metavar="FILE", type=Path, help="its key")
    listen.add_argument(
        "--ssl-ca-certs",
        metavar="FILE",
        type=Path,
        help="authorities that must have issued the callers' certificates",
    )


def run_serve(options: argparse.Namespace) -> int:
    """Serve until a signal (exit code 0) or until the engine is lost (75, so that it is restarted).

    Raises:
        MoeReplayError: of the kind that names what went wrong.
    """
    from moe_replay.cli.environment import set_defaults
    from moe_replay.cli.stages import START_AGAIN, say
    from moe_replay.engines.serve.socket import bind
    from moe_replay.recipe.bearer import exposure, read_token

    token = read_token(options.token_file)
    if warning := exposure(options.token_file):
        say(warning)
    check_exposure(options.host, token)
    check_options(options)
    with bind(options.host, options.port) as listening:
        say(f"reading {options.model} for {options.host}:{options.port} ...")
        num_workers = options.tensor_parallel_size * options.data_parallel_size
        set_defaults(os.environ, num_workers=num_workers)
        lost = _serve(options, token, listening)
    if lost is None:
        return 0
    say(f"moe-replay: {lost}")
    return START_AGAIN


def check_options(options: argparse.Namespace) -> None:
    """Raise `RecipeError` if an option is out of range or does not apply to the engine."""
    ranges = (
        ("--max-batch-size", options.max_batch_size >= 1, "at least 1"),
        ("--tensor-parallel-size", options.tensor_parallel_size >= 1, "at least 1"),
        ("--data-parallel-size", options.data_parallel_size >= 1, "at least 1"),
        (
            "--gpu-memory-utilization",
            options.gpu_memory_utilization is None or 0 < options.gpu_memory_utilization <= 1,
            "above 0, at most 1",
        ),
        ("--kv-cache-gib", options.kv_cache_gib is None or options.kv_cache_gib > 0, "above 0"),
        ("--port", 0 <= options.port < 1 << 16, "0 to 65535"),
    )
    for name, holds, expected in ranges:
        if not holds:
            value = getattr(options, name[2:].replace("-", "_"))
            raise RecipeError(f"{name} is {value}, expected {expected}")
    if options.engine == "embedded":
        given = [
            name
            for name, is_default in (
                ("--tensor-parallel-size", options.tensor_parallel_size == 1),
                ("--data-parallel-size", options.data_parallel_size == 1),
                ("--gpu-memory-utilization", options.gpu_memory_utilization is None),
                ("--kv-cache-gib", options.kv_cache_gib is None),
                ("--max-model-len", options.max_context_length is None),
            )
            if not is_default
        ]
        if given:
            raise RecipeError(f"{', '.join(given)}: only options of --engine vllm, not of embedded")


def _serve(options: argparse.Namespace, token: str | None, listening: socket.socket) -> str | None:
    """Serve; return None after a signal, or why the engine was lost."""
    from moe_replay.checkpoint.facts import read_facts
    from moe_replay.checkpoint.files import check_finite
    from moe_replay.cli.stages import quiet_transformers, say
    from moe_replay.engines.serve.app import EngineServer
    from moe_replay.engines.serve.run import log_to, run_until_signal, tls_options, web_server
    from moe_replay.engines.servers.push_files import OwnFolder

    quiet_transformers()
    tls = tls_options(options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs)
    facts = read_facts(options.model)
    # With such weights vLLM would answer every request with an error.
    check_finite(options.model)
    weights_dir = options.weights_dir or _memory_folder()
    if warning := room_for_pushes(weights_dir, facts, options.dtype):
        say(warning)
    log_to(say)
    with OwnFolder(weights_dir, "moe-replay-serve-") as folder:
        engine = _engine(options)
        server = EngineServer(
            engine,
            facts=facts,
            push_folder=folder.path,
            token=token,
            allowed_hosts=[options.host, *options.allowed_host],
        )
        port = listening.getsockname()[1]
        scheme = "https" if tls else "http"
        host = f"[{options.host}]" if ":" in options.host else options.host
        return run_until_signal(
            server,
            engine,
            web_server(server.application(), **tls),
            listening,
            say=say,
            what=f"{options.model} on {scheme}://{host}:{port}",
        )


def room_for_pushes(weights_dir: Path, facts: ModelFacts, dtype: str) -> str | None:
    """Return a warning if pushes of a model do not fit into a folder; None if it does not exist."""
    if not weights_dir.is_dir():
        return None
    values = sum(math.prod(shape) for shape in facts.weight_shapes.values())
    # The current weights, to roll back to, and the incoming ones.
    needed = 2 * values * (2 if dtype == "bfloat16" else 4)
    free = shutil.disk_usage(weights_dir).free
    if free >= needed:
        return None
    return (
        f"warning: {weights_dir} has {free / 1e9:.1f} GB free, pushes of this model need {needed / 1e9:.1f} GB (two copies): "
        "make room, or name another folder with --weights-dir (containers: a larger --shm-size)"
    )


def _memory_folder() -> Path:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def check_exposure(host: str, token: str | None) -> None:
    """Raise `RecipeError` if other machines could reach the server without a token."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and token is None:
        raise RecipeError(
            f"--host {host} can be reached from other machines, where anyone could replace the weights of the server: "
            "give --token-file, or listen on 127.0.0.1"
        )


def _engine(options: argparse.Namespace) -> ServedEngine:
    from moe_replay.engines.serve.engine import ThreadedEngine

    sizes: dict[str, Any] = {
        "dtype": options.dtype,
        "max_batch_size": options.max_batch_size,
        "record_routes": not options.no_record_routes,
    }
    model = Path(options.model)
    if options.engine == "embedded":
        from moe_replay.engines.embedded.engine import EmbeddedEngine

        return ThreadedEngine(
            lambda: EmbeddedEngine(model, **sizes), checkpoint=model, cancellable=True
        )
    from moe_replay.engines.vllm.serving import VllmServing

    return VllmServing(
        model,
        tensor_parallel_size=options.tensor_parallel_size,
        replicas=options.data_parallel_size,
        max_context_length=options.max_context_length,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_gib=options.kv_cache_gib,
        **sizes,
    )
