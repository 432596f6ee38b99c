"""Published import path of `dataclass_cli`: a launch script whose options are the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from miles.errors import UsageError

__all__ = ["dataclass_cli"]


def dataclass_cli(func: Callable[..., Any], env_var_prefix: str = "MILES_SCRIPT_") -> Callable[..., Any]:
    """`func(args: SomeDataclass)` as a function with one option per field, for `typer.run` or `app.command()`.

    An option that is not given comes from the environment variable `<prefix><FIELD>`, else from the field's default.
    The help of an option is `metadata["help"]` of its field. UsageError where typer is not installed.
    """
    try:
        import typer
    except ImportError:
        raise UsageError("dataclass_cli: launch scripts with options need the package typer; install it.") from None

    (parameter,) = inspect.signature(func).parameters.values()
    settings = get_type_hints(func)[parameter.name]
    if not dataclasses.is_dataclass(settings):
        raise UsageError(f"dataclass_cli: expected {func.__name__}(args: a dataclass), got {settings!r}.")
    hints = get_type_hints(settings)

    def option(field: dataclasses.Field[Any]) -> inspect.Parameter:
        default: Any = inspect.Parameter.empty
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        info = typer.Option(envvar=f"{env_var_prefix}{field.name.upper()}", help=field.metadata.get("help"))
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[hints[field.name], info])

    @functools.wraps(func)
    def command(**options: Any) -> Any:
        return func(settings(**options))

    fields = [field for field in dataclasses.fields(settings) if field.init]
    command.__signature__ = inspect.Signature([option(field) for field in fields])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command
