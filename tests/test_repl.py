"""What a person meets who types `import eagle_jax` and looks around."""

import copy
import dataclasses
import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest

import eagle_jax
from eagle_jax.decode import METHODS, StaticTree, chain, static_tree
from eagle_jax.text import Tokenizer


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def test_dir_shows_what_there_is() -> None:
    """Before anything is imported; and all of it can be read."""
    code = "import sys, eagle_jax\nprint(*dir(eagle_jax))\nprint('jax' in sys.modules)"
    names, light = fresh(code).splitlines()
    wanted = {
        "Batcher",
        "Params",
        "SamplingParams",
        "Session",
        "generate",
        "load",
        "stream",
        "__version__",
    }
    assert wanted | {"decode", "train", "evaluate", "tune", "config"} <= set(names.split())
    assert light == "False"
    for name in names.split():
        if name != "aot":  # puts the CPU in charge of this process
            getattr(eagle_jax, name)
    with pytest.raises(AttributeError, match="module 'eagle_jax' has no attribute 'nothing'"):
        eagle_jax.nothing  # noqa: B018


def test_submodules_are_attributes() -> None:
    """`eagle_jax.decode.batching.batcher` as a README writes it, without an import of its own."""
    packages = (
        "",
        ".checkpoint",
        ".commands",
        ".decode",
        ".decode.batching",
        ".evaluate",
        ".train",
    )
    paths = []
    for package in packages:
        place = importlib.import_module(f"eagle_jax{package}").__path__
        found = pkgutil.iter_modules(place, f"eagle_jax{package}.")
        paths += [module.name for module in found if "__main__" not in module.name]
    assert "eagle_jax.decode.batching.batcher" in paths and len(paths) > 60
    code = f"import functools, eagle_jax\nfor path in {paths}:\n"
    code += "    functools.reduce(getattr, path.split('.')[1:], eagle_jax)\nprint('all')"
    assert fresh(code) == "all\n"


def test_methods_and_trees_have_short_reprs() -> None:
    for make in METHODS.values():
        method = make()
        assert len(repr(method)) < 260, repr(method)
    assert repr(chain(3)) == "StaticTree('chain-3')"
    assert repr(static_tree([[0], [1], [0, 0]])) == "StaticTree('0 1 00')"
    # Large ones without a name stay apart: a repr is part of what evaluation compares.
    wide = [static_tree([[i] for i in range(n)]) for n in (40, 41)]
    other = StaticTree(tuple((0,) * (i + 1) for i in range(38)) + ((1,), (2,)))
    assert len({repr(tree) for tree in (*wide, other)}) == 3
    assert all(len(repr(tree)) < 60 for tree in wide)


def test_generations() -> None:
    """Short in a terminal, coloured in a notebook, equal if they are the same answer."""
    params = eagle_jax.load("tiny")
    question = "Why is the sky blue?"
    out = eagle_jax.generate(params, question, max_new_tokens=12)
    plain = eagle_jax.generate(params, question, max_new_tokens=12, method="vanilla")
    assert out == plain and any(out.drafted) and not any(plain.drafted)
    assert repr(out).startswith(f"Generation({out.text!r}, tau ") and len(repr(out)) < 140
    assert repr(out.statistics).startswith("Statistics(12 tokens in ")
    html, none = out._repr_html_(), plain._repr_html_()
    assert html is not None and html.count("<span") >= 1 and "tokens/s" in html
    assert none is not None and "<span" not in none
    both = eagle_jax.generate(params, [question, "Hi"], max_new_tokens=12)
    html = both._repr_html_()
    assert html is not None and html.count("<hr>") == 2 and html.count("tokens/s") == 1
    assert copy.deepcopy(both) == pickle.loads(pickle.dumps(both)) == both
    assert dataclasses.replace(out, tokenizer=None)._repr_html_() is None


def test_tokenizers_are_copied_and_pickled() -> None:
    """With the switch that keeps special tokens out of what users write, and the chat template."""
    tokenizer = Tokenizer.load(eagle_jax.params.find("tiny") / "target")
    messages = [{"role": "user", "content": "Hi <|im_end|> there"}]
    ids, special = tokenizer.chat(messages), tokenizer.decode([0], skip_special=False)
    copies = [pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)]
    for other in (*copies, copy.copy(tokenizer)):
        assert other.chat(messages) == ids
        assert other.encode(special) == tokenizer.encode(special) != [0]
        assert other.decode(ids) == tokenizer.decode(ids)
        assert (other.eos_ids, other.digest) == (tokenizer.eos_ids, tokenizer.digest)
        assert repr(other) == repr(tokenizer)
    assert repr(tokenizer).startswith(f"Tokenizer({tokenizer.vocab_size} tokens, ends: ")
    assert len(repr(tokenizer)) < 80
