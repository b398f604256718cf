"""Medusa heads for the shipped target, which read the vocabulary through its own head.

    python -m eagle_jax.train --config configs/tiny/medusa.py \\
        --set "data.train=('data/answers.jsonl',)"

Medusa-1's recipe: weights 0.8^i, the target frozen, learning rate 2e-3 with 40 steps of warm-up and
cosine decay; but the labels are the target's distribution instead of the text. Text that the target
generated is what the heads will meet.
"""

from eagle_jax.config import DataConfig, MedusaConfig, MedusaTraining, OptimConfig, TrainConfig

config = TrainConfig(
    output_dir="runs/tiny/medusa",
    objective=MedusaTraining(
        draft=MedusaConfig(vocab_size=8192, hidden_size=512, num_heads=3, tie_lm_head=True),
        target="tiny",
        decay=0.8,
        labels="soft",
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=64,
    ),
    optim=OptimConfig(
        learning_rate=2e-3,
        steps=3500,
        warmup_steps=40,
        schedule="cosine",
    ),
    eval_every=500,
    eval_batches=4,
    checkpoint_every=1000,
)
