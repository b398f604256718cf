"""The loop, round by round, against the reference; clipping; compiled programs."""

import dataclasses
import functools
import re

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from eagle_jax.decode import (
    DynamicTree,
    Eagle,
    EagleLookup,
    Medusa,
    PromptLookup,
    Rejection,
    Speculative,
    Vanilla,
    chain,
    executables,
    generate,
    named_tree,
    static_tree,
)
from eagle_jax.decode.method import Method
from eagle_jax.decode.program import Program, State, bucket_prompt, capacity
from eagle_jax.params import Draft, Params
from eagle_jax.testing import random_draft, tiny_eagle3

COUNT = 12


def make_program(method: Method, more: int = 0, pair: Params | None = None) -> Program:
    """The program that `generate` would use; `more` slots make it one of its own."""
    pair = pair or decoding.trained_pair()
    longest = bucket_prompt(max(map(len, decoding.PROMPTS)))
    slots = capacity(longest, decoding.NEW, method.depth) + more
    return Program.of(pair, method, slots)


def start(program: Program, counts: list[int], pair: Params | None = None) -> State:
    prompts = [np.array(prompt) for prompt in decoding.PROMPTS]
    limits = [len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)]
    pair = (pair or decoding.trained_pair()).with_draft(program.method.draft)
    return executables.start(program, pair, prompts, limits, decoding.SEEDS, executables.Clock())


def advance(
    program, state, temperature: float = 0.0, rounds: int = 1000, pair: Params | None = None, **more
) -> State:
    pair = (pair or decoding.trained_pair()).with_draft(program.method.draft)
    settings = decoding.sampling(temperature, vocab=pair.target_config.vocab_size, **more)
    return executables.advance(program, pair, state, settings, executables.Clock(), rounds)


def texts(state: State) -> list[list[int]]:
    rows = zip(np.asarray(state.tokens), np.asarray(state.length), strict=True)
    return [row[:length].tolist() for row, length in rows]


def answers(state: State) -> list[list[int]]:
    pairs = zip(texts(state), decoding.PROMPTS, strict=True)
    return [text[len(prompt) :] for text, prompt in pairs]


@functools.cache
def drafting_pair(**changes: bool | tuple[int, ...]) -> Params:
    """The trained pair with drafts that tell more than random ones.

    EAGLE-3 gets the flags `changes` and a vocabulary with gaps; the small model is the target with
    a few of its weights shaken, so that whole chains are accepted.
    """
    pair = decoding.trained_pair()
    config = tiny_eagle3(pair.target_config, **changes)
    known = np.array([0, 2, 3, 5, 7, 8, 10])
    eagle3 = random_draft(config, 9)
    table = jnp.asarray(known - np.arange(len(known)), jnp.int32)
    rng = np.random.default_rng(0)
    model = {
        name: x + 0.03 * jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for name, x in pair.target.items()
    }
    drafts = {
        **pair.drafts,
        "eagle3": Draft({**eagle3.params, "d2t": table}, config),
        "model": Draft(model, pair.target_config),
    }
    return dataclasses.replace(pair, drafts=drafts)


# Every child of the root, so that a round finds something whatever the draft is worth.
WIDE = static_tree(
    [(r,) for r in range(decoding.VOCAB)]
    + [(r, s) for r in range(decoding.VOCAB) for s in (0, 1, 3)]
    + [(r, 0, 1) for r in range(0, decoding.VOCAB, 2)]
)
HEAD3 = static_tree([[0], [1], [2], [3], [6], [0, 0], [0, 2], [3, 1], [6, 0], [0, 2, 0], [6, 0, 1]])
# Often enough a match, often enough none.
LOOKUP = PromptLookup(max_ngram=4, min_ngram=2, length=4, latest=True, truncate=True)
MC_SIM = Eagle(named_tree("mc_sim_7b_63"))
DRAFTING: dict[str, tuple[Method, float, dict]] = {
    "eagle greedy": (MC_SIM, 0.0, {}),
    "eagle": (MC_SIM, 1.0, {}),
    "eagle plain": (dataclasses.replace(MC_SIM, coupled=False), 1.0, {}),
    "eagle chain greedy": (Eagle(chain(3)), 0.0, {}),
    "eagle2 greedy": (Eagle(DynamicTree(5, 3, 14)), 0.0, {}),
    "eagle2": (Eagle(DynamicTree(4, 4, 20), confidence=1.5, sharpness=0.6), 1.0, {}),
    "eagle2 plain": (Eagle(DynamicTree(3, 5, 55), coupled=False), 1.0, {}),  # the whole pool
    "eagle2 one wide": (Eagle(DynamicTree(4, 1, 3)), 0.7, {}),
    "eagle3 greedy": (Eagle(HEAD3, head="eagle3"), 0.0, {}),
    "eagle3 chain": (Eagle(chain(4), head="eagle3"), 1.0, {"fc_norm": True, "norm_output": True}),
    "eagle3 dynamic greedy": (
        Eagle(DynamicTree(4, 5, 30), head="eagle3"),
        0.0,
        {"norm_output": True, "aux_layers": (2, 0)},
    ),
    "eagle3 dynamic": (Eagle(DynamicTree(4, 7, 30), head="eagle3"), 1.0, {"fc_norm": True}),
    # Filters: most children have no chance at all, and those are equal.
    "eagle2 filtered": (Eagle(DynamicTree(3, 4, 30)), 1.0, {"top_k": 2}),
    "eagle3 filtered": (Eagle(DynamicTree(3, 4, 20), head="eagle3"), 1.3, {"top_p": 0.6}),
    "eagle lookup": (EagleLookup(Eagle(chain(2)), LOOKUP), 0.0, {}),
    "eagle lookup, dynamic": (EagleLookup(Eagle(DynamicTree(3, 3, 9)), LOOKUP), 1.0, {}),
    "medusa greedy": (Medusa(WIDE), 0.0, {}),
    "medusa": (Medusa(WIDE), 1.0, {}),
    "medusa plain": (Medusa(WIDE, coupled=False), 1.0, {}),
    "speculative greedy": (Speculative(4), 0.0, {}),
    "speculative": (Speculative(3), 1.0, {}),
    "speculative plain": (Speculative(2, coupled=False), 1.0, {}),
    "speculative rejection": (Speculative(3, rule=Rejection()), 1.0, {}),
}


@pytest.mark.parametrize(("method", "temperature", "changes"), DRAFTING.values(), ids=DRAFTING)
def test_every_round_is_the_references(method: Method, temperature: float, changes: dict) -> None:
    """Catches every off-by-one between token, feature, position, noise and cache slot.

    Such bugs cost acceptance only, never correctness, so nothing else would notice. After each
    round, the reference drafts and verifies again from the committed text alone.
    """
    filters = {name: value for name, value in changes.items() if name.startswith("top")}
    params = drafting_pair(**{k: v for k, v in changes.items() if k not in filters})
    pair = reference.Pair.of(params)
    program = make_program(decoding.Recording(method), pair=params)
    state = start(program, [COUNT, COUNT - 1, COUNT - 5, COUNT], params)
    rounds, deepest, copied = 0, 0, set()
    while not bool(jnp.all(state.done)):
        before, done = texts(state), np.asarray(state.done)
        limits = np.asarray(state.limit)
        state = advance(program, state, temperature, 1, params, **filters)
        for row, text in enumerate(before):
            if done[row]:
                assert texts(state)[row] == text
                continue
            drafted, parents = (
                np.asarray(x)[row].tolist() for x in (state.method.tokens, state.method.parents)
            )
            rule = reference.Rule(temperature, seed=decoding.SEEDS[row], **filters)
            assert drafted[0] == text[-1]
            # A text of one token holds no pair to draft from.
            if len(text) > 1 or method.draft == "model":
                wanted = redrafted(method, pair, text, rule)
                assert (drafted[1:], parents[1:]) == wanted, (row, text)
            if isinstance(method, EagleLookup):
                copied.add(bool(reference.lookup(text, LOOKUP.max_ngram, LOOKUP.min_ngram, 1)))
            emitted = verified(method, pair, text, drafted, parents, rule)
            room = int(limits[row]) - len(text)
            assert texts(state)[row] == text + emitted[:room]
            deepest = max(deepest, len(emitted))
        rounds += 1
    # The test has seen paths of some length, and both ways of drafting.
    assert not isinstance(method, EagleLookup) or copied == {True, False}
    assert deepest > min(2, method.depth) and rounds < COUNT, (deepest, rounds)


def redrafted(
    method: Method, pair: reference.Pair, text: list[int], rule: reference.Rule
) -> tuple[list[int], list[int]]:
    """Tokens and parents of the nodes below the root, by the reference."""
    assert method.draft is not None
    if isinstance(method, EagleLookup):
        find = method.lookup
        tokens = reference.lookup(text, find.max_ngram, find.min_ngram, find.length)
        parents = [*range(len(tokens))]
        if not tokens:
            tokens, parents = redrafted(method.eagle, pair, text, rule)
        more = method.nodes - 1 - len(tokens)
        return [*tokens, *[text[-1]] * more], [*parents, *[0] * more]
    think = reference.drafter(pair, method.draft, text)
    if isinstance(method, Speculative):
        if isinstance(method.rule, Rejection):
            return own_draws(think, method.length, len(text), rule), [*range(method.length)]
        tree = chain(method.length)
    else:
        assert isinstance(method, Eagle | Medusa)
        tree = method.tree
    trust = {"coupled": method.coupled, "confidence": getattr(method, "confidence", 1.0)}
    if isinstance(tree, DynamicTree):
        assert isinstance(method, Eagle)
        return reference.dynamic_tree(
            think, len(text), tree, rule, **trust, sharpness=method.sharpness
        )
    nodes = [(), *tree.paths]
    tokens = reference.draft_tree(think, len(text), tree.paths, rule, **trust)
    return tokens, [nodes.index(path[:-1]) for path in tree.paths]


def own_draws(think: reference.Drafter, count: int, length: int, rule) -> list[int]:
    """A chain that is drawn with the draft's own noise."""
    words: list[int] = []
    for i in range(count):
        logits = reference.process(think(tuple(words)), rule)
        noise = reference.own_gumbel(rule.seed, length + i, len(logits))
        words.append(int(np.argmax(logits + noise)))
    return words


def verified(method: Method, pair, text, drafted, parents, rule) -> list[int]:
    """Tokens that a round must emit: each node that matters scored as a sequence of its own."""

    def words(node: int) -> list[int]:
        return [] if node == 0 else [*words(parents[node]), drafted[node]]

    if isinstance(method.rule, Rejection):
        think = reference.drafter(pair, "model", text)

        def law(logits) -> np.ndarray:
            return reference.softmax(reference.process(logits, rule))

        p = [law(reference.target(pair, text + drafted[1 : i + 1])[1][-1]) for i in range(4)]
        q = [law(think(tuple(drafted[1 : i + 1]))) for i in range(3)]
        return reference.rejection(p, q, drafted[1:], len(text), rule.seed)

    class Targets(dict[int, int]):
        def __missing__(self, node: int) -> int:
            above = words(node)
            logits = reference.target(pair, [*text, *above])[1][-1]
            noisy = reference.scores(logits, len(text) + len(above), rule)
            return self.setdefault(node, int(np.argmax(noisy)))

    def children(node: int) -> list[int]:
        return [i for i in range(1, len(drafted)) if parents[i] == node]

    targets = Targets()
    path = reference.accept(children, drafted, targets)
    return [targets[node] for node in path]


def test_a_draft_that_is_always_right_is_always_accepted() -> None:
    """Catches a bonus token lost or committed twice, and a limit that cuts between rounds only."""
    program = make_program(decoding.Clairvoyant((True, True, True)))
    state = advance(program, start(program, [12, 1, 7, 2]))
    assert np.asarray(state.rounds).tolist() == [3, 1, 2, 1]
    whole = slow_answers(12)
    assert answers(state) == [w[:n] for w, n in zip(whole, [12, 1, 7, 2], strict=True)]


def test_how_many_drafted_tokens_were_committed_is_counted() -> None:
    """Catches statistics that take a drafted token at the limit for the bonus token."""
    program = make_program(decoding.Clairvoyant((True, True, True)))
    state = advance(program, start(program, [12, 1, 7, 2]))
    # 4 + 4 + 4; a drafted token alone; 4 + 3 drafted; 2 drafted
    expected = [[0, 0, 0, 3], [0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 1, 0]]
    assert np.asarray(state.accepted).tolist() == expected


def slow_answers(count: int) -> list[list[int]]:
    pair = reference.Pair.of(decoding.trained_pair())
    return [reference.generate(pair, p, count, reference.Rule()) for p in decoding.PROMPTS]


def test_an_end_token_inside_the_accepted_path_ends_the_answer_there() -> None:
    """Catches an answer that runs on to the end of its round, and an end token in the prompt that
    ends it at once. The tokens are chosen so that each stands in the middle of a path of 4."""
    whole = slow_answers(20)
    first = {
        (row, token): answer.index(token) for row, answer in enumerate(whole) for token in answer
    }
    middle = [token for (row, token), at in first.items() if at % 4 in (1, 2) and at > 4]
    eos = tuple(sorted(set(middle), key=middle.index)[:2])
    assert len(eos) == 2 and any(token in prompt for token in eos for prompt in decoding.PROMPTS)
    program = make_program(decoding.Clairvoyant((True, True, True)))
    state = advance(program, start(program, [20] * 4), stop_token_ids=eos)
    expected = []
    for answer in whole:
        ends = [i for i, token in enumerate(answer) if token in eos]
        expected.append(answer[: ends[0] + 1] if ends else answer)
    assert answers(state) == expected
    assert any(len(a) % 4 in (2, 3) and len(a) < 20 for a in expected)
    rounds = np.asarray(state.rounds)
    assert rounds.tolist() == [-(-len(answer) // 4) for answer in expected]
    # A limit one token before the end token wins, though the path goes on to the end token.
    shorter = [len(answer) - 1 for answer in expected]
    state = advance(program, start(program, shorter))
    assert answers(state) == [a[:n] for a, n in zip(expected, shorter, strict=True)]


def test_rounds_can_be_taken_in_any_portions() -> None:
    """Catches state that is lost, or repeated, between two calls of the loop."""
    program = make_program(Eagle(chain(3)))
    whole = advance(program, start(program, [20, 3, 20, 11]), 1.0)
    parts = start(program, [20, 3, 20, 11])
    for rounds in (1, 2, 0, 3, 1000):
        parts = advance(program, parts, 1.0, rounds)
    assert texts(whole) == texts(parts)
    assert whole.rounds.tolist() == parts.rounds.tolist()
    assert whole.accepted.tolist() == parts.accepted.tolist()


def test_a_row_without_room_is_done_at_once() -> None:
    """Catches a loop that never ends, or one token too many."""
    program = make_program(Vanilla())
    state = advance(program, start(program, [0, 1, 0, 2]))
    assert [len(answer) for answer in answers(state)] == [0, 1, 0, 2]
    assert np.asarray(state.rounds).tolist() == [0, 1, 0, 2]


def test_the_second_call_compiles_nothing() -> None:
    """Catches prompts, lengths, seeds, temperatures and filters that are baked into programs, and
    helper operations outside of them: each costs a new user's first seconds at every call."""
    pair, method = decoding.trained_pair(), Eagle(chain(3))
    first = {"temperature": 0.7, "top_p": 0.9, "seed": decoding.SEEDS}
    generate(pair, decoding.PROMPTS, method=method, max_new_tokens=20, **first)
    with decoding.compilations() as seen:
        other = {"temperature": 1.9, "top_p": 0.4, "seed": [0, 9, 8, 7]}
        prompts = [[1] * 30, [4], [3, 2], [5] * 9]
        generate(pair, prompts, method=Eagle(chain(3)), max_new_tokens=11, **other)
        assert seen == []
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)))
        assert seen  # the counter counts


HOST = re.compile(r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(|callback|host_compute")


def test_nothing_in_the_loop_talks_to_the_host() -> None:
    """Catches a debugging print or callback: on a GPU, each costs a synchronisation a round."""
    program = make_program(Eagle(chain(3)))
    advance(program, start(program, [2] * 4), 1.0)
    assert not any(HOST.search(executable.as_text()) for executable in executables.executables())

    def chatty(x):
        jax.debug.callback(lambda y: None, x)
        return x + 1

    compiled = jax.jit(chatty).lower(jnp.ones(3)).compile()
    assert HOST.search(str(compiled.as_text()))  # it would be seen


def test_state_is_donated() -> None:
    """Catches a second copy of the cache in memory, and its copying at every call."""
    program = make_program(Eagle(chain(1)), more=8)
    state = start(program, [2] * 4)
    size = sum(x.nbytes for x in jax.tree.leaves((state.cache, state.method)))
    cache = state.cache
    advance(program, state, 1.0)
    decode = executables.executables()[-1]
    assert decode.memory_analysis().alias_size_in_bytes >= size
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_prompts_are_padded_to_a_few_lengths() -> None:
    """Catches a bucket below the prompt, which would cut it, and one program per length."""
    buckets = [bucket_prompt(length) for length in range(1, 1025)]
    assert all(bucket >= length for length, bucket in enumerate(buckets, start=1))
    assert buckets == sorted(buckets) and buckets[-1] == 1024 and len(set(buckets)) <= 6


def test_capacity_leaves_room_for_the_last_rounds_writes() -> None:
    """Catches a cache without slack: XLA would shift the write back over older slots."""
    slots = [capacity(128, new, 5) for new in range(1, 1001)]
    assert all(s >= 128 + new + 5 + 1 for new, s in enumerate(slots, start=1))
    assert len(set(slots)) <= 6
