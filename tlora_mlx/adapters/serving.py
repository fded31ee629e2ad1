"""What mlx-lm's server needs to serve a run."""

from __future__ import annotations

import socket

from tlora_mlx.adapters.run import read_run
from tlora_mlx.errors import UserError, first_line
from tlora_mlx.invocation import suggested
from tlora_mlx.models.compatibility import mlx_lm_warning
from tlora_mlx.models.model_directory import find_model, read_model_config


def server_arguments(run: str, base_model: str | None = None) -> list[str]:
    """The arguments of ``mlx_lm.server`` for a run and its base model, which may be elsewhere now.

    Raises:
        UserError: it is no run, is stored in the form of an earlier build, or mlx-lm would compute
            a different base model.
    """
    adapter = read_run(run)
    if "lora_parameters" not in adapter.config:
        again = suggested("export", run, "--format", "run")
        raise UserError(f"{run} was written by an earlier build; write it anew with: {again}")
    try:
        name, path = find_model(base_model or adapter.model)
    except UserError as error:
        raise UserError(f"the base model of {adapter.label}: {error}; see --base-model") from None
    if warning := mlx_lm_warning(name, read_model_config(path, name)):
        raise UserError(warning.removeprefix("warning: "))
    return ["--model", name, "--adapter-path", str(adapter.directory)]


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there: mlx-lm's fails with a traceback, and does not end.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        # As mlx-lm's server chooses between IPv4 and IPv6 (mlx_lm/server.py, _run_http_server).
        kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        socket.create_server(address[:2], family=kind).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot listen on --host {host} --port {port}: {reason}") from None
