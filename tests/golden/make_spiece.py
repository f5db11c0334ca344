"""Makes spiece.npz: a small SentencePiece model with umT5's settings, and the ids that it gives.

    python tests/golden/make_spiece.py [--check]

The arrays: ``model``, the bytes of spiece.model (Unigram, byte fallback, a few rules that normalise
characters); ``ids`` [PROMPTS, longest], from SentencePiece itself, ``</s>`` last, then -1.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("spiece.npz")
CORPUS = (
    "a red square moves left",
    "a blue circle moves right, fast",
    "the dog runs along the beach in the evening light",
    "a close-up of a dog's face, cinematic lighting, 4k",
    "色调艳丽,过曝,静态,细节模糊不清",
    "ein schöner Hund läuft über die Wiese",
)
PROMPTS = (
    "a red square",
    "",
    "The dog's ﬁrst run, ½ speed & more!",
    "静态 cats 🐈 и собаки",
    "emoji 😀 at the end 😀",
    "ünknöwn ẞ letters\x07 and «quotes»",
    "unsquare redmoves leftright",
)
RULES = "FB01\t66 69\nBD\t31 2F 32\nAB\t22\nBB\t22\n"  # the ligature fi, one half, guillemets


def make_arrays() -> dict[str, np.ndarray]:
    """Trains the model on a fixed corpus and runs the reference on the prompts."""
    import sentencepiece

    content = io.BytesIO()
    # The model keeps the name of the rules, which must not be that of a folder of this machine.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("rules.tsv").write_text(RULES)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 4),
            model_writer=content,
            model_type="unigram",
            vocab_size=420,
            byte_fallback=True,
            normalization_rule_tsv="rules.tsv",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
        )
    model = content.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model, add_eos=True)
    ids = processor.encode(list(PROMPTS))
    padded = np.full((len(ids), max(map(len, ids))), -1, np.int32)
    for row, numbers in zip(padded, ids, strict=True):
        row[: len(numbers)] = numbers
    return {"model": np.frombuffer(model, np.uint8), "ids": padded}


if __name__ == "__main__":
    from golden_file import write_or_check  # beside this script, which is run as one

    raise SystemExit(write_or_check(GOLDEN, make_arrays(), about=__doc__))
