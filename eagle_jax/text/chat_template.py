"""Chat templates: Jinja sources of model directories, compiled in a sandbox."""

from __future__ import annotations

from typing import Any

from eagle_jax.inputs import one_line
from eagle_jax.text.messages import short


def compile_template(template: str | None) -> Any:
    """Returns the template, to be rendered.

    Raises:
        ValueError: there is none, or it is not a Jinja template.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if template is None:
        raise ValueError("chat_template=None: add one to tokenizer_config.json, or use encode()")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, ValueError, RecursionError) as error:
        raise ValueError(f"chat_template: not a Jinja template ({one_line(error)})") from error


def template_text(template: Any) -> str | None:
    """Returns the source in a `tokenizer_config.json`; of several by name, the default one.

    Raises:
        ValueError: it is not a string.
    """
    found = template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        # Several, by name.
        found = next((e.get("template") for e in template if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"chat_template={short(template)} in tokenizer_config.json: must be a string"
        )
    return found
