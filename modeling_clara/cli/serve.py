"""`clara serve`: answers questions over HTTP, for the clients that know OpenAI's API.

It listens on this machine only, unless keys are given. The log goes to standard output, a JSON object a line.
"""

import argparse
import os
import signal
import socket
import sys
import time

from .models import add_hybrid_option, add_model_options, load_model_of, with_hybrid

HOST, PORT = "127.0.0.1", 8000
BACKLOG = 2048  # connections that wait, also while the model is loaded


def add_parser(commands) -> argparse.ArgumentParser:
    """The options of the command."""
    parser = commands.add_parser("serve", help="answer questions over HTTP, for clients of OpenAI's API")
    parser.add_argument("corpus", help="folder or Hub id of a corpus")
    add_model_options(parser, model=" (default: the one that made the corpus)")
    parser.add_argument("--revision", help="branch, tag or commit of the corpus on the Hub")
    add_hybrid_option(parser)
    parser.add_argument("--host", default=HOST, help=f"address to listen on (default: {HOST}, this machine only)")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument(
        "--api-keys", metavar="FILE", help="keys of clients, one a line; also CLARA_API_KEYS, with commas between them"
    )
    parser.add_argument("--read-keys", metavar="FILE", help="keys that may not change documents; also CLARA_READ_KEYS")
    parser.add_argument("--read-only", action="store_true", help="nobody may change documents")
    parser.add_argument(
        "--allow-anonymous", action="store_true", help="listen on an address of the network though there are no keys"
    )
    parser.add_argument("--served-name", metavar="NAME", help="the model's id for clients (default: its name)")
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="a page whose scripts may ask; repeatable"
    )
    parser.add_argument("--max-batch", type=int, default=16, help="questions answered together (default: 16)")
    parser.add_argument("--max-queue", type=int, default=64, help="questions that wait, before 429 (default: 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for an answer, before 504 (default: 120)"
    )
    parser.add_argument(
        "--generator",
        metavar="URL",
        help="vLLM that writes the answers with the merged generator, http://HOST:8000/v1; its key in "
        "CLARA_GENERATOR_KEY (default: this process writes them)",
    )
    parser.add_argument(
        "--generator-model", metavar="NAME", help="name of the generator on that server (default: the only one there)"
    )
    parser.add_argument(
        "--milvus",
        metavar="URI",
        help="Milvus that finds the shortlists, http://HOST:19530; its token in MILVUS_TOKEN",
    )
    parser.add_argument("--collection", metavar="NAME", help="beginning of the collection's name in Milvus")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    try:
        from ..service.app import create_app  # noqa: F401
        from ..service.server import build_server
    except ImportError as error:
        raise ImportError(
            f"`clara serve` needs {error.name}: pip install {error.name}, or the extra `serve` from a clone of the "
            "repository."
        ) from error
    from ..service.auth import KEYS, READ_KEYS, read_keys
    from ..service.logs import log_to

    keys = read_keys(KEYS, arguments.api_keys), read_keys(READ_KEYS, arguments.read_keys)
    check_address(arguments, any(keys))
    listener = listen(arguments.host, arguments.port)  # before what takes long
    start = time.perf_counter()
    model, corpus = load(arguments)
    loaded = time.perf_counter()
    log_to(sys.stdout)
    server = build_server(build_app(model, corpus, keys, arguments), arguments.timeout)
    return serve(server, listener, f"{len(corpus):,} documents", (start, loaded))


def load(arguments: argparse.Namespace) -> tuple:
    """The model and the corpus."""
    from .. import CompressedCorpus

    corpus = CompressedCorpus.open(arguments.corpus, arguments.revision, **index_options(arguments))
    corpus = with_hybrid(corpus, arguments.hybrid)
    return load_model_of(corpus, arguments.model, arguments.backbone, dtype=arguments.dtype), corpus


def build_app(model, corpus, keys: tuple, arguments: argparse.Namespace):
    """The app of a corpus and its model; `keys` are those of clients, and of those that only read."""
    from ..service.app import create_app

    return create_app(
        build_engine(model, corpus, arguments),
        api_keys=keys[0],
        read_keys=keys[1],
        read_only=arguments.read_only,
        limits=build_limits(arguments),
        model_id=arguments.served_name,
        cors_origins=arguments.cors_origin,
        hosts=known_hosts(arguments, any(keys)),
    )


def serve(server, listener: socket.socket, what: str, times: tuple[float, float]) -> int:
    """Answer until a signal says to stop; what runs then is finished. Returns the exit status.

    `times` are those before and after loading, in seconds of `time.perf_counter`.
    """
    from ..service.logs import logger

    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def tell(startup, sockets=None):
        await startup(sockets)
        seconds = {"load_seconds": times[1] - times[0], "start_seconds": time.perf_counter() - times[1]}
        print(f"clara serve: {url} answers from {what}; Ctrl-C stops it", file=sys.stderr, flush=True)
        seconds = {name: round(value, 2) for name, value in seconds.items()}
        logger.info("ready", extra={"fields": {"url": url, **seconds}})

    startup = server.startup
    server.startup = lambda sockets=None: tell(startup, sockets)
    # uvicorn raises a signal again when it is done, for the handler from before: to stop is not to fail.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    logger.info("stopped")
    return 0 if server.started else 1


# --- before it serves ------------------------------------------------------------------------------------------------


def check_address(arguments: argparse.Namespace, has_keys: bool) -> None:
    """Raise a ValueError if everybody on the network could ask without a key."""
    from ..service.auth import is_loopback

    if not (has_keys or arguments.allow_anonymous or is_loopback(arguments.host)):
        raise ValueError(
            f"`host` must be a loopback address if there are no keys, got {arguments.host}. Everybody who reaches it "
            "could ask and change documents: set CLARA_API_KEYS or pass --api-keys FILE, or --allow-anonymous."
        )


def known_hosts(arguments: argparse.Namespace, has_keys: bool) -> set[str] | None:
    """What the Host header may name: without keys this machine alone, else anything."""
    if has_keys or arguments.allow_anonymous:
        return None
    return {"localhost", "127.0.0.1", "::1", arguments.host.lower()}


def listen(host: str, port: int) -> socket.socket:
    """The socket that clients reach; an OSError if the port is taken.

    It listens at once: another process may bind the same port as long as none does.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"`port` {port} of {host} must be free: {error.strerror}. Pass another one, or 0."
        raise OSError(message) from None
    return listener


def index_options(arguments: argparse.Namespace) -> dict:
    """Keywords of `CompressedCorpus.open` for the index that finds shortlists."""
    if arguments.milvus is None and arguments.collection is not None:
        raise ValueError("`collection` must go with `milvus`. Add its URI.")
    if arguments.milvus is None:
        return {}
    return {"backend": "milvus", "uri": arguments.milvus, "collection": arguments.collection}


def build_engine(model, corpus, arguments: argparse.Namespace):
    """The engine, with another server as generator if one is named."""
    from ..service.engine import Engine

    generator = None
    if arguments.generator is None and arguments.generator_model is not None:
        raise ValueError("`generator_model` must go with `generator`. Add the address of its server.")
    if arguments.generator is not None:
        from ..service.remote import RemoteGenerator

        key, name = os.environ.get("CLARA_GENERATOR_KEY"), arguments.generator_model
        generator = RemoteGenerator(arguments.generator, name, key, timeout=arguments.timeout)
    options = {"max_batch": arguments.max_batch, "max_queue": arguments.max_queue}
    return Engine(model, corpus, generator=generator, **options)


def build_limits(arguments: argparse.Namespace):
    """The limits of a request."""
    from ..service.limits import Limits

    if not arguments.timeout > 0:
        raise ValueError(f"`timeout` must be > 0 seconds, got {arguments.timeout:g}. Default: 120.")
    return Limits(answer_seconds=arguments.timeout)
