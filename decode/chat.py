"""Chats in the terminal: answers are streamed, and the conversation is remembered.

    python decode/chat.py [--model DIR] [--temperature 0.7]

An empty line or Ctrl-D ends the chat; `/new` starts a new conversation.
"""

import argparse

import eagle_jax
from eagle_jax import cli, compilation_cache
from eagle_jax.decode import stream


def fit(params, messages, new_tokens):
    """Returns the conversation without its oldest turns, so that `new_tokens` more tokens fit."""
    room = params.target_config.max_position_embeddings - new_tokens
    while len(messages) > 1 and len(params.tokenizer.chat(messages)) > room:
        messages = messages[2:]  # drop a question and its answer
    return messages


def answer(params, messages, **options):
    """Streams one answer to the terminal and returns it."""
    pieces = []
    # A chat is a list of {"role", "content"}; the tokenizer's template turns it into token ids.
    # One round commits several tokens; `rounds_per_chunk` rounds run on the device before Python
    # gets their tokens. A small number streams more smoothly, a large one has less overhead.
    for part in stream(params, messages, rounds_per_chunk=4, **options):
        print(part.text, end="", flush=True)
        pieces.append(part.text)
    statistics = part.statistics  # statistics of the whole answer so far
    print(f"\n[{statistics.tokens_per_second:.0f} tokens/s, {statistics.tau:.1f} tokens a pass]")
    return "".join(pieces)


def main():
    """Reads questions and answers them until the user ends the chat."""
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
        except ValueError as error:  # for example a message that is too long; the chat goes on
            print(f"error: {error}")
            messages = messages[:-1]
            continue
        messages.append({"role": "assistant", "content": text})
        seed += 1  # each answer gets its own noise; the same seeds repeat the same chat


if __name__ == "__main__":
    cli.run(main)
