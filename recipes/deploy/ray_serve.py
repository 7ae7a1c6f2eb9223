"""`clara serve` as an application of Ray Serve: replicas on any machine of a cluster, behind one address.

    serve run recipes.deploy.ray_serve:build replicas=2 "serve=CORPUS --read-only"

`serve` is the command line of `clara serve`, of which Ray replaces `--host` and `--port`. Each replica loads the model
and opens the corpus, which all machines must see. Keys of clients are read from the environment of the machines.
"""

import asyncio
import contextlib
import logging
import shlex

from ray import serve
from ray.serve import Application

from modeling_clara.cli import parse
from modeling_clara.cli.serve import build_app, check_address, load
from modeling_clara.service.auth import KEYS, READ_KEYS, read_keys

logger = logging.getLogger("modeling_clara.service")
REFRESH_SECONDS = 5.0  # after which every replica sees what others have changed


def build(settings: dict[str, str]) -> Application:
    """The application; settings: `serve`, `replicas` (default 2), and of each `cpus` (default 1) and `gpus` (0)."""
    arguments = parse(["serve", *shlex.split(settings["serve"])])
    numbers = {name: float(settings.get(name, default)) for name, default in {"cpus": 1, "gpus": 0}.items()}

    def app():  # called in each replica
        keys = read_keys(KEYS, arguments.api_keys), read_keys(READ_KEYS, arguments.read_keys)
        check_address(arguments, any(keys))
        app = build_app(*load(arguments), keys, arguments)
        app.router.lifespan_context = refreshing(app.router.lifespan_context)
        return app

    deployment = serve.deployment(serve.ingress(app)(), name="clara")
    options = {"num_cpus": numbers["cpus"], "num_gpus": numbers["gpus"]}
    return deployment.options(num_replicas=int(settings.get("replicas", 2)), ray_actor_options=options).bind()


def refreshing(lifespan):
    """The lifespan of an app that also takes in, every few seconds, what other replicas have written."""

    @contextlib.asynccontextmanager
    async def wrapped(app):
        async with lifespan(app):
            task = asyncio.create_task(refresh(app.state.service.engine))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    return wrapped


async def refresh(engine) -> None:
    """Open the newest state of the corpus again and again."""
    while True:
        await asyncio.sleep(REFRESH_SECONDS)
        try:
            await engine.write(lambda corpus: None)
        except (OSError, ValueError) as error:  # of the shared folder; what is open is served meanwhile
            logger.warning("refresh", extra={"fields": {"problem": str(error)}})
