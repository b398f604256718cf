"""Finds the best tree for Medusa heads from the accuracy of every head and rank.

    python train/medusa_tree.py --data data --task alpaca --nodes 63

Vanilla decoding answers the questions greedily; then the guesses of every head are compared with
the tokens of the answers. The tree takes the paths with the largest products of accuracies.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import eagle_jax
from eagle_jax import cli
from eagle_jax.decode import best_tree, generate
from eagle_jax.drafters.medusa.module import MedusaHeads
from eagle_jax.evaluate.tasks import read_tasks
from eagle_jax.models import Transformer, bind
from eagle_jax.models.transformer import packed_mask


def main():
    """Answers the questions, counts correct guesses and prints the best tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="shipped set or directory")
    parser.add_argument("--draft", help="directory of other heads")
    parser.add_argument("--data", default="", help="directory of question files; default: our own")
    parser.add_argument("--task", default="own")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=63, help="drafted nodes of the tree")
    args = parser.parse_args()
    params = eagle_jax.load(args.model, draft=args.draft)
    config = params.drafts["medusa"].config

    @jax.jit
    def places(params, tokens):
        """Returns the rank of token t + 2 + i in the scores of head i at token t."""
        length = tokens.shape[1]
        positions = jnp.arange(length)[None]
        target = bind(Transformer, params.target_config, params.target, params.layout)
        features = target(tokens, positions, packed_mask(jnp.zeros_like(tokens))).features
        ranks = []
        draft = params.drafts["medusa"]
        heads = bind(MedusaHeads, config, draft.params, draft.layout)
        for i, scores in enumerate(heads.logits(features, target)):
            label = jnp.roll(tokens, -2 - i, axis=1)[..., None]
            own = jnp.take_along_axis(scores, label, axis=-1)
            ranks.append(jnp.sum(scores > own, axis=-1)[0])
        return jnp.stack(ranks)

    hits, counts = np.zeros((config.num_heads, args.ranks)), np.zeros(config.num_heads)
    (questions,) = read_tasks((args.task,), args.data, args.limit).values()
    for question in tqdm(questions):
        chat = params.tokenizer.chat([{"role": "user", "content": question.turns[0]}])
        answer = generate(params, chat, method="vanilla", max_new_tokens=args.new_tokens).tokens
        text = [*chat, *answer.tolist()]
        padded = np.zeros((1, -(-len(text) // 128) * 128), np.int32)
        padded[0, : len(text)] = text
        for i, ranks in enumerate(np.asarray(places(params, padded))):
            drafted = ranks[max(0, len(chat) - 2 - i) : len(text) - 2 - i]
            hits[i] += (drafted[:, None] == np.arange(args.ranks)).sum(axis=0)
            counts[i] += len(drafted)
    accuracy = (hits / counts[:, None]).round(4).tolist()
    for i, row in enumerate(accuracy):
        print(f"head {i}: {' '.join(f'{share:.3f}' for share in row)}")
    tree = best_tree(accuracy, args.nodes)
    shape = np.bincount(tree.depths)[1:].tolist()
    print(json.dumps({"accuracy": accuracy, "nodes_by_depth": shape}))


if __name__ == "__main__":
    cli.run(main)
