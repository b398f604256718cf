"""A target of 1.1 billion parameters, with the shape of models that run on one small device.

    python benchmarks/large_pair.py --data data/open.jsonl.gz --validation data/open_val.jsonl

trains it and its drafts on one 80 GB GPU for a fixed time (ten minutes by default) and replaces
`optim.steps` by the number of steps that fit. The pair serves to measure speed: 20 M tokens of text
do not make a good chat model of this size. The learning rates are guesses from those of the shipped
pair; no run with them diverged (docs/results.md, "A pair of 1.1 billion parameters").
"""

from eagle_jax.config import DataConfig, NextToken, OptimConfig, TrainConfig, TransformerConfig

config = TrainConfig(
    output_dir="runs/large/target",
    objective=NextToken(
        model=TransformerConfig(
            vocab_size=8192,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ),
    data=DataConfig(
        train=("data/open.jsonl.gz",),
        validation=("data/open_val.jsonl",),
        tokenizer="eagle_jax/pretrained/tiny/target",
        sequence_length=1024,
        batch_size=8,
    ),
    optim=OptimConfig(
        learning_rate=6e-4,
        steps=2500,
        warmup_steps=100,
        schedule="cosine",
        final_fraction=0.05,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    attention="cudnn",
    eval_batches=8,
    keep_checkpoints=1,
)
