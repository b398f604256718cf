"""Decoding over several devices: the same text, and nothing large sent between them."""

import dataclasses
import functools
import importlib
import re

import jax
import numpy as np
import pytest

from eagle_jax import aot, sharding
from eagle_jax.config import TransformerConfig
from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    Lookahead,
    Medusa,
    PromptLookup,
    Recycling,
    Speculative,
    Vanilla,
    chain,
    executables,
    generate,
    static_tree,
)
from eagle_jax.decode.batching import schedule as stages
from eagle_jax.decode.batching.batcher import Batcher
from eagle_jax.decode.program import capacity
from eagle_jax.decode.sampling import SamplingParams
from eagle_jax.layout import Layout
from eagle_jax.models import param_shapes
from eagle_jax.models.transformer import Transformer
from eagle_jax.params import Draft, Params
from eagle_jax.testing import (
    random_draft,
    random_params,
    tiny_draft,
    tiny_eagle3,
    tiny_medusa,
    tiny_model,
    tiny_target,
)

HOT = SamplingParams(temperature=1.0)
drawing = importlib.import_module("eagle_jax.decode.top_k")  # a function has that name too

VOCAB = 64
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
PROMPTS = [[7], [3, 9], [1, 2, 3, 4, 5], [i * i % VOCAB for i in range(17)]]
TREE = static_tree([[0], [1], [0, 0], [0, 1]])
METHODS = {
    "vanilla": Vanilla(),
    "eagle": Eagle(chain(3)),
    "eagle2": Eagle(DynamicTree(depth=3, k=4, drafted=10)),
    "eagle3": Eagle(DynamicTree(depth=3, k=4, drafted=10), head="eagle3"),
    "medusa": Medusa(TREE),
    "speculative": Speculative(3),
    "lookahead": Lookahead(ngram=3, window=4, guesses=2),
    "prompt lookup": PromptLookup(length=4),
    "recycling": Recycling(TREE, width=3),
}


LAYOUT = Layout(gate_up_fused=True)


@functools.cache
def pair(experts: int = 0) -> Params:
    """One target, and a draft of every kind whose sizes eight devices can share."""
    more = {"num_experts": experts, "num_experts_per_tok": 2} if experts else {}
    target = tiny_target(VOCAB, intermediate_size=64, **HEADS, **more)
    size = {**HEADS, "intermediate_size": 64}
    drafts = (
        tiny_draft(target, **size),
        tiny_eagle3(target, draft_vocab_size=32, **size),
        tiny_medusa(target),
        tiny_model(target, **(size | {"num_experts": 0, "num_experts_per_tok": 0})),
    )
    return Params(
        random_params(Transformer, target, seed=1, layout=LAYOUT),
        {config.kind: random_draft(config, seed=2, layout=LAYOUT) for config in drafts},
        target,
        LAYOUT,
    )


def placed(params: Params, mesh: jax.sharding.Mesh) -> Params:
    def put(weights):
        return jax.device_put(weights, sharding.weight_shardings(mesh, weights, stored=False))

    drafts = {kind: Draft(put(d.params), d.config, d.layout) for kind, d in params.drafts.items()}
    return dataclasses.replace(params, target=put(params.target), drafts=drafts)


def mesh(tensor: int, devices: int = 8, expert: int = 1) -> jax.sharding.Mesh:
    return sharding.make_mesh(tensor=tensor, expert=expert, devices=jax.devices()[:devices])


def texts(params: Params, method: str, temperature: float, prompts=PROMPTS) -> list[list[int]]:
    options = {"method": METHODS[method], "max_new_tokens": 20, "temperature": temperature}
    return [row.tolist() for row in generate(params, prompts, seed=3, **options).tokens]


@functools.cache
def alone(method: str, temperature: float, experts: int = 0) -> list[list[int]]:
    return texts(pair(experts), method, temperature)


@pytest.mark.parametrize(
    ("tensor", "devices"), [(2, 2), (4, 4), (1, 8), (2, 8)], ids="tp2 tp4 dp8 dp4-tp2".split()
)
@pytest.mark.parametrize("method", ["vanilla", "eagle"])
def test_devices_change_no_text(method, tensor, devices):
    """Catches a sum that is missing or made twice, and rows that get each other's noise."""
    prompts = PROMPTS * 2  # eight rows
    params = placed(pair(), mesh(tensor, devices))
    assert texts(params, method, 0.0, prompts)[:4] == alone(method, 0.0)


@pytest.mark.parametrize("method", ["vanilla", "eagle2"])
def test_settings_on_several_devices(method):
    """Catches counts, masks or biases of one part of the vocabulary only."""
    rows = [
        SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=0.5, seed=3),
        SamplingParams(logit_bias={3: 2.0, 60: 1.0}, bad_words=[[9], [3, 60]], presence_penalty=1),
        SamplingParams(temperature=0.8, allowed_token_ids=range(20, 50), min_p=0.02, top_k=9),
        SamplingParams(temperature=1.2, top_p=0.9, min_tokens=9, stop_token_ids=[5, 40]),
    ]
    options = {"method": METHODS[method], "max_new_tokens": 20, "sampling": rows}
    wanted = generate(pair(), PROMPTS, **options)
    assert generate(placed(pair(), mesh(tensor=2, devices=4)), PROMPTS, **options) == wanted


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_no_group_divides(rows):
    """Catches a batch that is padded with another row's text, or refused."""
    params = placed(pair(), mesh(tensor=4))
    assert texts(params, "eagle", 1.0, PROMPTS[:rows]) == alone("eagle", 1.0)[:rows]


@pytest.mark.parametrize("method", ["vanilla", "eagle"])
def test_experts_on_different_devices(method):
    """Catches a token whose expert is elsewhere and is left out."""
    params = placed(pair(experts=8), mesh(tensor=2, expert=2))
    up = params.target["layers.0.mlp.experts.gate_up_proj.kernel"]
    assert up.addressable_shards[0].data.shape[0] == 2
    assert texts(params, method, 1.0) == alone(method, 1.0, experts=8)


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_are_replaced_on_a_mesh(rows):
    """Catches a row that is put into one group's part only, and a program that is made twice."""
    params = placed(pair(), mesh(tensor=4))
    options = {"max_prompt": 20, "max_new_tokens": 20, "sampling": HOT, "chunk": 4}
    batcher = Batcher(params, method=METHODS["eagle"], rows=rows, **options)
    numbers = [batcher.submit(prompt, seed=3 + i) for i, prompt in enumerate(PROMPTS)]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    for piece in batcher.run():
        found[piece.request] += np.asarray(piece.tokens).tolist()
    assert list(found.values()) == alone("eagle", 1.0)
    made = len(executables.executables())
    for i, prompt in enumerate(PROMPTS):
        batcher.submit(prompt, seed=i)
    assert list(batcher.run()) and len(executables.executables()) == made


def test_batch_sizes_on_a_mesh(monkeypatch):
    """Catches a batch size that the groups do not divide, refused or with half of its rows; a state
    placed otherwise than the programs of its size take it."""
    monkeypatch.setattr(stages, "MOVE", 1)
    params = placed(pair(), mesh(tensor=4))
    table = {1: METHODS["eagle"], 3: "vanilla", 4: METHODS["eagle"]}
    options = {"max_prompt": 20, "max_new_tokens": 20, "sampling": HOT, "chunk": 2}
    batcher = Batcher(params, method=table, rows=4, **options)
    batcher.warm_up()
    made = len(executables.executables())
    found: dict[int, list[int]] = {}
    numbers = [batcher.submit(PROMPTS[0], seed=3)]
    pieces = batcher.step()
    numbers += [batcher.submit(prompt, seed=3 + i) for i, prompt in enumerate(PROMPTS) if i]
    for piece in [*pieces, *batcher.run()]:
        found.setdefault(piece.request, []).extend(np.asarray(piece.tokens).tolist())
    assert [found[number] for number in numbers] == alone("eagle", 1.0)
    assert batcher.statistics().moves >= 2 and len(executables.executables()) == made


def compiled(method: str, params: Params) -> str:
    """The program of the loop."""
    executables.forget()
    texts(params, method, 1.0)
    return executables.executables()[-1].as_text()


LAYERS = 2
# Of a pass: two sums per layer, one of the embedding's parts.
PASS = 2 * LAYERS + 1


def sums_of(text: str, *shape: int) -> int:
    sizes = ",".join(map(str, shape))
    return len(re.findall(rf"= f32\[{sizes}\]\S* all-reduce(?:-start)?\(", text))


def test_a_pass_sends_two_sums_a_layer():
    """Catches a weight or cache that is gathered, and activations that travel more than needed."""
    params = placed(pair(), mesh(tensor=4, devices=4))
    width = params.target_config.hidden_size
    text = compiled("vanilla", params)
    assert sums_of(text, 4, 1, width) == PASS
    # The drawn token: the largest score, and the first place that has it.
    assert aot.collectives(text)["all-reduce"][0] == PASS + 2
    assert set(aot.collectives(text)) == {"all-reduce"}

    text = compiled("eagle", params)
    assert sums_of(text, 4, 4, width) == PASS + 3  # and the draft's catch-up with this round


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_mesh(method):
    """The same text; and nothing sent has the shape of a matrix or a cache, whole or in parts."""
    params = placed(pair(), mesh(tensor=4))
    text = compiled(method, params)
    assert texts(params, method, 1.0) == alone(method, 1.0)
    config = params.target_config
    large = {shape.shape for shape in param_shapes(Transformer, config, params.layout).values()}
    for draft in params.drafts.values():
        large |= {x.shape for x in draft.params.values()}
    large = {shape for shape in large if len(shape) > 1}
    slots = capacity(128, 20, METHODS[method].depth)
    large |= {(b, k, slots, config.head_dim) for b in (2, 4) for k in (1, 4)}
    sent = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce|collective-permute)", text
    )
    assert sent
    found = {tuple(int(n) for n in sizes.split(",") if n) for sizes in sent}
    assert not found & large


def test_a_draft_vocabulary_on_a_mesh():
    """Catches entries of one device's part that are taken for tokens, and columns that travel."""
    draft = tiny_draft(
        pair().target_config,
        **HEADS,
        intermediate_size=64,
        draft_vocab_size=32,
    )
    whole = dataclasses.replace(
        pair(), drafts={"eagle": random_draft(draft, seed=2, layout=LAYOUT)}
    )
    params = placed(whole, mesh(tensor=4))
    head = params.drafts["eagle"].params["lm_head.kernel"]
    assert head.addressable_shards[0].data.shape == (32, 8)
    assert params.drafts["eagle"].params["d2t"].sharding.is_fully_replicated
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    options |= {"method": Eagle(DynamicTree(depth=2, k=4, drafted=10))}
    expected = generate(whole, PROMPTS, **options)
    executables.forget()
    found = generate(params, PROMPTS, **options)
    text = executables.executables()[-1].as_text()
    for row, other in zip(found.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(row, other)
    assert found.statistics.rounds == expected.statistics.rounds
    assert found.statistics.tau > 1.1  # something was drafted
    assert not re.search(r"= \(?\w+\[(32,32|32,8)\]\S* all-", text)


@pytest.mark.parametrize("chunk", [2, 8])
def test_top_k_of_parts(monkeypatch, chunk):
    """Catches an index that misses its device's offset, and ties that the wrong device wins."""
    monkeypatch.setattr(drawing, "_CHUNK", chunk)
    scores = np.random.default_rng(0).integers(0, 9, (4, 3, VOCAB)).astype(np.float32)
    scores[0, 0] = -np.inf
    wanted = jax.lax.top_k(scores, 3)
    for devices in (mesh(4), mesh(8), mesh(1)):

        @jax.jit
        def best(x, devices=devices):
            with sharding.using(devices):
                return drawing.top_k(sharding.constrain(x, "batch", None, "vocab"), 3)

        for got, expected in zip(best(sharding.put(devices, scores)), wanted, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_a_target_that_cannot_be_cut():
    config: TransformerConfig = pair().target_config
    with pytest.raises(ValueError, match="num_key_value_heads=4: cannot be cut into 8"):
        sharding.check_tensor(mesh(8), [config])
