"""An independent draft model for the shipped target: two layers, a quarter of its width.

    eagle-jax train --config configs/tiny/model.py \\
        --set "data.train=('data/answers.jsonl',)"

It is distilled from the target's distributions on assistant tokens. As in classic speculative
decoding, it shares only the tokenizer with the target.
"""

from eagle_jax.config import DataConfig, Distillation, OptimConfig, TrainConfig, TransformerConfig

config = TrainConfig(
    output_dir="runs/tiny/model",
    objective=Distillation(
        draft=TransformerConfig(
            vocab_size=8192,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        target="tiny",
    ),
    data=DataConfig(
        train=("data/answers.jsonl",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=64,
    ),
    optim=OptimConfig(
        learning_rate=3e-3,
        steps=3500,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.02,
        clip_norm=1.0,
    ),
    eval_every=500,
    eval_batches=4,
    checkpoint_every=1000,
)
