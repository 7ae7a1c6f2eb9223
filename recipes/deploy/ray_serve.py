"""`clara serve` as an application of Ray Serve: replicas on any machine of a cluster, behind one address.

    serve run recipes.deploy.ray_serve:build replicas=2 "serve=CORPUS --read-only"

`serve` is the command line of `clara serve`, of which Ray replaces `--host` and `--port`. Each replica loads the model
and opens the corpus, which all machines must see. Keys of clients are read from the environment of the machines.
"""

import shlex

from ray import serve
from ray.serve import Application

from modeling_clara.cli import parse
from modeling_clara.cli.serve import build_app, check_address, load
from modeling_clara.service.auth import KEYS, READ_KEYS, read_keys


def build(settings: dict[str, str]) -> Application:
    """The application; settings: `serve`, `replicas` (default 2), and of each `cpus` (default 1) and `gpus` (0)."""
    arguments = parse(["serve", *shlex.split(settings["serve"])])
    numbers = {name: float(settings.get(name, default)) for name, default in {"cpus": 1, "gpus": 0}.items()}

    def app():  # called in each replica
        keys = read_keys(KEYS, arguments.api_keys), read_keys(READ_KEYS, arguments.read_keys)
        check_address(arguments, any(keys))
        return build_app(*load(arguments), keys, arguments)

    deployment = serve.deployment(serve.ingress(app)(), name="clara")
    options = {"num_cpus": numbers["cpus"], "num_gpus": numbers["gpus"]}
    return deployment.options(num_replicas=int(settings.get("replicas", 2)), ray_actor_options=options).bind()
