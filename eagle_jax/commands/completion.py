"""Shell completions of `eagle-jax`, generated from the parsers of its commands."""

from __future__ import annotations

import argparse

from eagle_jax import commands

_BASH = """\
# eval "$(eagle-jax --completion bash)"
_eagle_jax() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} --help --version --completion"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
            *) case "${{COMP_WORDS[1]}}" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ ${{#COMPREPLY[@]}} -eq 0 ] && [ "${{current#-}}" = "$current" ]; then
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _eagle_jax eagle-jax
"""

_ZSH = '# eval "$(eagle-jax --completion zsh)"\nautoload -U +X bashcompinit && bashcompinit\n'


def script(shell: str) -> str:
    """Returns the completion script for a shell to evaluate.

    Args:
        shell: "bash" or "zsh".

    Raises:
        ValueError: the shell is another one.
    """
    if shell not in ("bash", "zsh"):
        raise ValueError(f"completion={shell!r}: give bash or zsh")
    options, choices = [], []
    for name in commands.COMMANDS:
        actions = commands.module(name).parser(f"{commands.PROGRAM} {name}")._actions
        words = [word for action in actions for word in action.option_strings if word[1] == "-"]
        options.append(f'                {name}) words="{" ".join(words)}" ;;')
        choices += [_choices(name, action) for action in actions if _values(action)]
    text = _BASH.format(
        commands=" ".join(commands.COMMANDS),
        options="\n".join(options),
        choices="\n".join(choices),
    )
    return text if shell == "bash" else _ZSH + text


def _values(action: argparse.Action) -> list[str]:
    """Returns the words that an option accepts, if they are a fixed set, else an empty list."""
    if action.dest == "method" and action.option_strings:
        from eagle_jax.decode.registry import AUTO, METHODS

        return [*METHODS, AUTO]
    return [str(value) for value in action.choices or ()] if action.option_strings else []


def _choices(name: str, action: argparse.Action) -> str:
    where = "|".join(f'"{name} {word}"' for word in action.option_strings)
    return f'            {where}) words="{" ".join(_values(action))}" ;;'
