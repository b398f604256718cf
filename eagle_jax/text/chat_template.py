"""Chat templates: compiles the Jinja sources of model directories in a sandbox."""

from __future__ import annotations

from typing import Any

from eagle_jax.inputs import one_line
from eagle_jax.text.messages import short


def compile_template(template: str | None) -> Any:
    """Returns the compiled template.

    Raises:
        ValueError: there is no template, or it is not a Jinja template.
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
    """Returns the template's source in `tokenizer_config.json`, or the one named "default".

    Raises:
        ValueError: the source is not a string.
    """
    found = template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        # A list of named templates.
        found = next((e.get("template") for e in template if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"chat_template={short(template)} in tokenizer_config.json: must be a string"
        )
    return found
