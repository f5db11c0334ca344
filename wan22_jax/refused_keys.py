"""Which keys of diffusion-pipe does this version know without doing what they ask for?"""

from typing import Any

_LATER_VERSION = "is not supported by this version yet"
_STAGES = (
    "layers are not divided among GPUs in stages; [parallel] fsdp divides the weights, context the "
    "tokens of each clip, and blocks_to_swap keeps weights in host memory"
)
_E5M2 = "e5m2 keeps two bits of a weight's mantissa, one less than 'float8' (e4m3); use 'float8'"
_CONVERT = (
    "convert it into the model folder instead: wan22-convert --ckpt_path MODEL --{} FILE --out "
    "FOLDER, and give that FOLDER as ckpt_path"
)

# key -> (values that change nothing, why any other value is refused)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter.type": (("lora",), "only low-rank matrices are trained; use 'lora', of higher rank"),
    "model.transformer_dtype": ((None, "bfloat16", "float32", "float8"), _E5M2),
    "model.transformer_path": ((None,), _CONVERT.format("transformer")),
    "model.llm_path": ((None,), _CONVERT.format("text_encoder")),
    "model.cache_text_embeddings": ((True,), "text embeddings are always cached; leave it out"),
    "model.text_encoder_fp8": (
        (False,),
        "one that does not fit into GPU memory is streamed from host memory, to the same bits",
    ),
    "save_dtype": (
        (None, "float32", "float16", "bfloat16"),
        "rounds a LoRA's small weights to two or three bits; use 'bfloat16'",
    ),
    "pipeline_stages": ((None, 1), _STAGES),
    "control_path": ((None,), "belongs to edit models; TI2V-5B has no control input"),
    "shuffle_metadata": ((None, True), "the order is always shuffled, by seed and epoch"),
    "online_captions": ((None, False), f"captions read while training {_LATER_VERSION}"),
}

# key -> why leaving it out trains the same; such a key is accepted with whatever value
IGNORED = {
    "caching_batch_size": "wan22-cache chooses its batches by the memory that there is",
    "map_num_proc": "wan22-cache chooses its own parallelism",
    "compile": "the train step is always compiled",
    "partition_method": "it splits layers among pipeline stages, of which there is one",
    "partition_split": "it splits layers among pipeline stages, of which there is one",
    "reentrant_activation_checkpointing": "it chooses between two ways of torch to recompute",
}
