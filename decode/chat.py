"""Chat in the terminal: answers stream in, the conversation is remembered.

    python decode/chat.py [--model DIR] [--temperature 0.7]

An empty line or Ctrl-D ends it, `/new` starts over.
"""

import argparse

import eagle_jax
from eagle_jax import cli, compilation_cache
from eagle_jax.decode import stream


def fit(params, messages, new_tokens):
    """The conversation without its oldest turns, so that an answer of `new_tokens` still fits."""
    room = params.target_config.max_position_embeddings - new_tokens
    while len(messages) > 1 and len(params.tokenizer.chat(messages)) > room:
        messages = messages[2:]  # a question and its answer
    return messages


def answer(params, messages, **options):
    """Stream one answer to the terminal and return it."""
    pieces = []
    # A chat is a list of {"role", "content"}; the tokenizer's template turns it into token ids.
    # One round commits several tokens; `rounds_per_chunk` is how many rounds run on the device
    # before Python sees their tokens: small feels smoother, large costs fewer interruptions.
    for part in stream(params, messages, rounds_per_chunk=4, **options):
        print(part.text, end="", flush=True)
        pieces.append(part.text)
    statistics = part.statistics  # of the whole answer so far
    print(f"\n[{statistics.tokens_per_second:.0f} tokens/s, {statistics.tau:.1f} tokens a pass]")
    return "".join(pieces)


def main():
    """Ask, answer, remember."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="shipped pair or directory")
    parser.add_argument("--method", default="eagle", help="eagle or vanilla: the text is the same")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    compilation_cache.enable()  # the second start does not compile
    params = eagle_jax.load(args.model)

    messages, seed = [], args.seed
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            break
        if not question:
            break
        if question == "/new":
            messages = []
            continue
        messages = fit(
            params, [*messages, {"role": "user", "content": question}], args.max_new_tokens
        )
        options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        try:
            text = answer(params, messages, method=args.method, seed=seed, **options)
        except ValueError as error:  # a message too long, say: the conversation goes on
            print(f"error: {error}")
            messages = messages[:-1]
            continue
        messages.append({"role": "assistant", "content": text})
        seed += 1  # each answer has noise of its own; the same seeds repeat the same chat


if __name__ == "__main__":
    cli.run(main)
