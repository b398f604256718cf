"""The target of the shipped pair: a 21M-parameter Llama-architecture chat model.

    eagle-jax train --config configs/tiny/target.py \\
        --set "data.train=('data/open.jsonl.gz',)" --set "data.validation=('data/open_val.jsonl',)"

Size, learning rate and epochs were chosen by validation loss (figures are in MODEL_CARD.md). On an
H100 add `--set attention=cudnn`; training then takes about two minutes.
"""

from eagle_jax.config import DataConfig, NextToken, OptimConfig, TrainConfig, TransformerConfig

config = TrainConfig(
    output_dir="runs/tiny/target",
    objective=NextToken(
        model=TransformerConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    ),
    data=DataConfig(
        train=("data/open.jsonl.gz",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=64,
    ),
    optim=OptimConfig(
        learning_rate=2e-3,
        steps=1800,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.05,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    eval_every=200,
    eval_batches=8,
    checkpoint_every=900,
)
