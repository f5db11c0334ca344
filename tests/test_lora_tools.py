"""wan22-lora: what each tool writes is what its matrices say, and its refusals name the culprit."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from export_runs import SEVERAL, draw_adapter, start_lora_run
from tiny_run import keep_programs

from convert import lora_algebra, lora_tools
from wan22_jax import adapter_join
from wan22_jax.adapter import Adapter, load_adapter, to_tensors
from wan22_jax.adapter_file import write_adapter
from wan22_jax.adapter_targets import LoRATarget
from wan22_jax.model_tensors import FolderTensors, HeldTensors, adapter_delta, stacked_weight_shapes
from wan22_jax.tensor_files import SafetensorsFiles


class Files(NamedTuple):
    model: Path
    lora: Path  # of all targets, rank 4, on this model
    other: Path  # of two targets, ranks 2 and 3, of another maker
    run: Path
    adapter: Adapter


@pytest.fixture(scope="module")
def files(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    with keep_programs(folder / "programs"):
        model, run_dir, adapter = start_lora_run(official, folder)
        lora = folder / "lora.safetensors"
        assert run("convert", "--lora", run_dir, "--out", lora) == 0
        other = draw_adapter(stacked_weight_shapes(FolderTensors(model)), SEVERAL, seed=5)
        write_adapter(Adapter(other.matrices, other.alphas, {}, ""), folder / "other.safetensors")
        yield Files(model, lora, folder / "other.safetensors", run_dir, adapter)


def run(*words: object) -> int:
    return lora_tools.main([str(word) for word in words])


def delta(adapter: Adapter, name: str) -> np.ndarray:
    found = adapter_delta(adapter, name)
    assert found is not None
    return found


def weight_names(adapter: Adapter) -> list[str]:
    return [f"blocks.{layer}.{target}.weight" for target in adapter.alphas for layer in range(2)]


def refuses(capsys, complaint: str, *words: object) -> None:
    capsys.readouterr()
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line), line


# --- convert --------------------------------------------------------------------------------------


def test_convert_keeps_every_bit_through_all_dialects(files, tmp_path, capsys):
    adapter = load_adapter(files.lora)
    matrices = {n: m.astype(ml_dtypes.bfloat16) for n, m in adapter.matrices.items()}
    write_adapter(
        Adapter(matrices, adapter.alphas, adapter.metadata, ""), tmp_path / "0.safetensors"
    )
    for number, dialect in enumerate(("kohya", "diffusers", "comfyui"), 1):
        source, out = tmp_path / f"{number - 1}.safetensors", tmp_path / f"{number}.safetensors"
        assert run("convert", "--lora", source, "--out", out, "--format", dialect) == 0
        assert f"bfloat16, rank 4, alpha 6, step 7, 0.0 MB, names of {dialect}" in (
            capsys.readouterr().out
        )
    first, last = (tmp_path / f"{number}.safetensors" for number in (0, 3))
    assert SafetensorsFiles(first).metadata == SafetensorsFiles(last).metadata
    before, after = (safetensors.numpy.load_file(path) for path in (first, last))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_convert_refuses_what_it_cannot_write_or_read(files, tmp_path, capsys):
    refuses(capsys, "exists already", "convert", "--lora", files.lora, "--out", files.other)
    assert load_adapter(files.other).alphas == {"self_attn.q": 6.0, "ffn.0": 3.0}
    (tmp_path / "folder.safetensors").mkdir()
    words = ("convert", "--lora", files.lora, "--out", tmp_path / "folder.safetensors")
    refuses(capsys, r"folder\.safetensors: is a folder, so", *words, "--overwrite")
    (tmp_path / "folder.safetensors").rmdir()
    out = tmp_path / "out.safetensors"
    words = ("convert", "--lora", files.lora, "--out", tmp_path / "out.pt")
    refuses(capsys, r"must end in \.safetensors", *words)
    refuses(capsys, "no such file", "convert", "--lora", tmp_path / "no", "--out", out)
    assert not list(tmp_path.iterdir())
    strange = Adapter(files.adapter.matrices, files.adapter.alphas, {"base_digest": "b" * 64}, "")
    write_adapter(strange, tmp_path / "strange.safetensors")
    words = ("convert", "--lora", tmp_path / "strange.safetensors", "--model", files.model)
    refuses(capsys, "was trained on base model bbbb", *words, "--out", out)
    words = ("convert", "--lora", files.other, "--model", files.model, "--dtype", "float16")
    assert run(*words, "--out", out) == 0
    assert "forward pass: relative error" in capsys.readouterr().out
    assert run("convert", "--lora", files.lora, "--out", out, "--overwrite") == 0
    assert load_adapter(out).matrices["blocks.ffn.0.lora_A"].dtype == np.float32


def test_what_a_header_says_is_printed_as_one_short_line(files, tmp_path, capsys):
    odd = "7\n\x1b[31mred\u2028\x85" + "x" * 10**5
    header = {"step": odd, "base_digest": odd}
    adapter = Adapter(files.adapter.matrices, files.adapter.alphas, header, "")
    write_adapter(adapter, tmp_path / "odd.safetensors")
    words = ("convert", "--lora", tmp_path / "odd.safetensors", "--out")
    assert run(*words, tmp_path / "out.safetensors") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert r"alpha 6, step 7\n\x1b[31mred\u2028\x85, 0." in line
    assert load_adapter(tmp_path / "out.safetensors").metadata["step"] == odd
    refuses(
        capsys,
        r"base model 7 \\x1b\[31mred \S{1,64}, this",
        *words,
        tmp_path / "b.safetensors",
        "--model",
        files.model,
    )


def test_a_lora_in_eight_bits_is_refused(tmp_path, capsys):
    name = "diffusion_model.blocks.0.ffn.0.lora_A.weight"
    header = f'{{"{name}":{{"dtype":"F8_E4M3","shape":[1,1],"data_offsets":[0,1]}}}}'.encode()
    path = tmp_path / "small.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    words = ("convert", "--lora", path, "--out", tmp_path / "out.safetensors")
    refuses(capsys, r"small\.safetensors: .*lora_A\.weight is F8_E4M3; a LoRA of 16", *words)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda name, m: m[:, :0] if "lora_A" in name else m[:, :, :0],
            r"lora_A is empty, \[2, 0,",
        ),
        (lambda name, m: m[:, :, :0] if "lora_A" in name else m, r"lora_A is empty, \[2, 4, 0\]"),
        (
            lambda name, m: m * np.float32(np.nan) if "ffn.2" in name else m,
            r"ffn\.2\.lora_A has inf",
        ),
        (None, r"cross_attn\.k\.alpha is inf, a number"),
    ],
)
@pytest.mark.parametrize("words", [("convert",), ("resize", "--energy", 1), ("merge",)])
def test_a_lora_without_sensible_numbers_is_refused(
    change, complaint, words, files, tmp_path, capsys
):
    tensors = to_tensors(files.adapter, "kohya")
    if change is None:
        tensors |= {n: np.array(np.inf, np.float32) for n in tensors if n.endswith("alpha")}
    else:
        matrices = {name: change(name, m) for name, m in files.adapter.matrices.items()}
        # As Diffusers' dialect, since the tensors of the others need a scale.
        tensors = to_tensors(Adapter(matrices, files.adapter.alphas, {}, ""), "diffusers")
    safetensors.numpy.save_file(tensors, tmp_path / "bad.safetensors")
    words = (*words, "--lora", tmp_path / "bad.safetensors", "--out", tmp_path / "out.safetensors")
    refuses(capsys, rf"bad\.safetensors: .*{complaint}", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_lora_that_does_not_fit_its_model_is_refused(files, tmp_path, capsys):
    three = {name: np.concatenate([m, m[:1]]) for name, m in files.adapter.matrices.items()}
    narrow = {
        name: m[..., :24] if "_A" in name else m for name, m in files.adapter.matrices.items()
    }
    for matrices, wrong in ((three, r"\[3, \d, 48\]"), (narrow, r"\[2, \d, 24\]")):
        lora = tmp_path / "strange.safetensors"
        write_adapter(Adapter(matrices, files.adapter.alphas, {}, ""), lora)
        for words in (("convert",), ("resize", "--rank", 2)):
            flags = (*words, "--lora", lora, "--model", files.model)
            wanted = rf"not a LoRA of this model \(\S+ is {wrong}, the model takes \[2, "
            refuses(capsys, wanted, *flags, "--out", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["strange.safetensors"]


# --- resize ---------------------------------------------------------------------------------------


def test_resize_keeps_what_a_low_rank_can(files, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run("resize", "--lora", files.lora, "--rank", 2, "--out", out, "--format", "kohya") == 0
    said = capsys.readouterr().out
    small = load_adapter(out)
    assert set(small.ranks.values()) == {2} == set(small.alphas.values())
    assert small.metadata["rank"] == "2"
    assert small.metadata["step"] == "7"
    full = np.stack([delta(files.adapter, f"blocks.{n}.ffn.0.weight") for n in range(2)])
    left = np.stack([delta(small, f"blocks.{n}.ffn.0.weight") for n in range(2)])
    sizes = np.linalg.svd(full.astype(np.float64), compute_uv=False)
    error = np.sqrt(1 - (sizes[:, :2] ** 2).sum() / (sizes**2).sum())
    assert np.linalg.norm(full - left) / np.linalg.norm(full) == pytest.approx(error, rel=1e-4)
    assert f"ffn.0         rank 4 -> 2: relative error {error:.1e}" in said


def test_a_rank_that_is_not_needed_costs_nothing(files, tmp_path):
    adapter = load_adapter(files.other)
    doubled = adapter_join.join_loras([(adapter, 0.5), (adapter, 0.5)], source="twice")
    assert doubled.ranks == {"self_attn.q": 4, "ffn.0": 6}
    write_adapter(doubled, tmp_path / "doubled.safetensors")
    out = tmp_path / "out.safetensors"
    words = ("resize", "--lora", tmp_path / "doubled.safetensors", "--energy", 0.999999)
    assert run(*words, "--out", out) == 0
    back = load_adapter(out)
    assert back.ranks == {"self_attn.q": 2, "ffn.0": 3}
    for name in weight_names(adapter):
        np.testing.assert_allclose(delta(back, name), delta(adapter, name), atol=1e-5)


def test_resize_refuses_ranks_that_make_no_sense(files, tmp_path, capsys):
    words = ("resize", "--lora", files.lora, "--out", tmp_path / "out.safetensors")
    refuses(capsys, r"lora\.safetensors: has rank 4, .*--rank 5 is more", *words, "--rank", 5)
    refuses(capsys, "--rank: 1 or more expected", *words, "--rank", 0)
    refuses(capsys, r"--energy: a share in \(0, 1\] expected, got 1\.5", *words, "--energy", 1.5)
    assert not list(tmp_path.iterdir())


# --- merge ----------------------------------------------------------------------------------------


def test_loras_add_up_with_their_strengths(files, tmp_path):
    out = tmp_path / "sum.safetensors"
    words = ("merge", "--lora", f"{files.lora}:0.5", "--lora", files.other, "--out", out)
    assert run(*words) == 0
    joined, other = load_adapter(out), load_adapter(files.other)
    assert joined.ranks["self_attn.q"] == 4 + 2
    assert joined.ranks["ffn.2"] == 4
    assert joined.metadata["base_digest"] == load_adapter(files.run).metadata["base_digest"]
    for name in weight_names(files.adapter):
        wanted = 0.5 * delta(files.adapter, name)
        if name.split(".", 2)[2].removesuffix(".weight") in SEVERAL:
            wanted = wanted + delta(other, name)
        np.testing.assert_allclose(delta(joined, name), wanted, atol=1e-5)


def test_loras_are_merged_into_a_model(files, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    words = ("merge", "--model", files.model, "--lora", f"{files.run}:-0.5", "--lora", files.other)
    assert run(*words, "--out", out, "--dtype", "float32") == 0
    assert "69 tensors, float32, 0.00 GB; equal bit by bit; forward" in capsys.readouterr().out
    base, merged, other = (
        FolderTensors(files.model), SafetensorsFiles(out), load_adapter(files.other)
    )  # fmt: skip
    for name in base.shapes:
        wanted = base.read(name).astype(np.float32)
        for adapter, strength in ((files.adapter, -0.5), (other, 1.0)):
            found = adapter_delta(adapter, name)
            wanted = wanted if found is None else wanted + strength * found
        np.testing.assert_allclose(merged.read(name), wanted, atol=1e-6, err_msg=name)
    assert '"strength": -0.5' in merged.metadata["merged_loras"]
    assert str(files.model) not in str(merged.metadata)


def test_merge_refuses_what_does_not_go_together(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    stranger = draw_adapter({"ffn.0": (2, 5, 6)}, {"ffn.0": LoRATarget(2, 2.0)})
    write_adapter(Adapter(stranger.matrices, stranger.alphas, {}, ""), tmp_path / "a.safetensors")
    words = ("merge", "--lora", files.other, "--lora", tmp_path / "a.safetensors", "--out", out)
    refuses(capsys, r"are LoRAs of two models \(blocks\.ffn\.0\.lora_A is", *words)
    words = ("merge", "--model", files.model, "--lora", tmp_path / "a.safetensors", "--out", out)
    refuses(
        capsys, r"not a LoRA of this model \(blocks\.ffn\.0\.lora_A is \[2, 2, 6\], the", *words
    )
    write_adapter(stranger, tmp_path / "b.safetensors")  # says of which base it is
    words = ("merge", "--lora", files.lora, "--lora", tmp_path / "b.safetensors", "--out", out)
    refuses(capsys, r"are LoRAs of two models \(blocks\.ffn\.0\.lora_A", *words)
    elsewhere = {**load_adapter(files.lora).metadata, "base_digest": "b" * 64}
    same = Adapter(files.adapter.matrices, files.adapter.alphas, elsewhere, "")
    write_adapter(same, tmp_path / "c.safetensors")
    words = ("merge", "--lora", files.lora, "--lora", tmp_path / "c.safetensors", "--out", out)
    refuses(capsys, "were trained on 2 base models; join those of one", *words)
    words = ("merge", "--model", files.model, "--lora", tmp_path / "b.safetensors", "--out", out)
    refuses(capsys, "was trained on base model aaaa", *words)
    refuses(capsys, "a strength is a number", "merge", "--lora", f"{files.lora}:nan", "--out", out)
    for strength in ("1e39", "-3e38"):
        for model in ((), ("--model", files.model)):
            words = ("merge", "--lora", f"{files.lora}:{strength}", *model, "--out", out)
            wanted = (
                r"lora\.safetensors: a strength of \S+ takes its numbers beyond float32; choose"
            )
            refuses(capsys, wanted, *words)
    words = ("merge", "--lora", f"{files.lora}:1e37", "--model", files.model, "--out", out)
    refuses(capsys, r"computes infinite or NaN numbers; .* or smaller strengths of LoRAs", *words)
    words = ("merge", "--lora", files.lora, "--format", "official", "--out", out)
    refuses(capsys, "--format official is that of a whole model; add --model", *words)
    assert not out.exists()


# --- extract --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(files, tmp_path_factory) -> Path:
    """The model with the LoRA of two targets merged into it, and one bias changed."""
    out = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    words = ("merge", "--model", files.model, "--lora", files.other, "--dtype", "float32")
    assert run(*words, "--out", out) == 0
    tensors = safetensors.numpy.load_file(out)
    tensors["head.head.bias"] = tensors["head.head.bias"] + 1
    safetensors.numpy.save_file(tensors, out)
    return out


def test_extract_finds_the_lora_that_was_merged(files, tuned, tmp_path, capsys):
    out = tmp_path / "found.safetensors"
    (tmp_path / "tuned" / "transformer").mkdir(parents=True)  # as Diffusers has it
    (tmp_path / "tuned" / "transformer" / "x.safetensors").symlink_to(tuned)
    words = ("extract", "--base", files.model, "--tuned", tmp_path / "tuned", "--rank", 3)
    words += ("--dtype", "float32")
    assert run(*words, "--out", out) == 0
    said = capsys.readouterr().out
    assert "warning: 1 other tensors differ, which a LoRA cannot hold: head.head.bias" in said
    assert "ffn.0         rank 3: relative error" in said
    assert "100.00 % of the energy" in said
    assert "of what the tuned model changes" in said
    found, merged = load_adapter(out, base_digest=None), load_adapter(files.other)
    assert found.ranks == {"self_attn.q": 3, "ffn.0": 3}
    assert found.metadata["base_digest"] == load_adapter(files.run).metadata["base_digest"]
    for name in weight_names(merged):
        np.testing.assert_allclose(delta(found, name), delta(merged, name), atol=1e-5)


def test_extract_says_how_much_a_low_rank_loses(files, tuned, tmp_path, capsys):
    out = tmp_path / "found.safetensors"
    words = ("extract", "--base", files.model, "--tuned", tuned, "--rank", 1, "--out", out)
    assert run(*words) == 0
    said = capsys.readouterr().out
    full = np.stack([delta(load_adapter(files.other), f"blocks.{n}.ffn.0.weight") for n in (0, 1)])
    sizes = np.linalg.svd(full.astype(np.float64), compute_uv=False)
    error = np.sqrt(1 - (sizes[:, 0] ** 2).sum() / (sizes**2).sum())
    assert f"ffn.0         rank 1: relative error {error:.1e}" in said


def test_extract_refuses_models_that_it_cannot_compare(files, tuned, tmp_path, capsys):
    words = ("extract", "--base", files.model, "--out", tmp_path / "out.safetensors", "--tuned")
    refuses(capsys, "the linears of the two models are the same", *words, files.model)
    refuses(capsys, "is not a Wan transformer", *words, files.lora)
    refuses(capsys, "no such model folder or file", *words, tmp_path / "none")
    refuses(capsys, r"--rank 49: cross_attn\.k is \[48, 48\]; choose", *words, tuned, "--rank", 49)
    refuses(capsys, "--rank: 1 or more", *words, tuned, "--rank", 0)
    tensors = safetensors.numpy.load_file(tuned)
    del tensors["head.modulation"]
    tensors["patch_embedding.bias"] = tensors["patch_embedding.bias"][:3]
    safetensors.numpy.save_file(tensors, tmp_path / "less.safetensors")
    complaint = (
        r"\(head\.modulation is .* and None; patch_embedding\.bias is \[48\] and \[3\], 2 in"
    )
    refuses(capsys, complaint, *words, tmp_path / "less.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    content = tuned.read_bytes()
    words = ("extract", "--base", files.model, "--tuned", tuned, "--out", tuned, "--overwrite")
    refuses(capsys, r"tuned\.safetensors: is a model to read, so it is not", *words)
    assert tuned.read_bytes() == content


def test_a_model_folder_with_a_lost_part_is_refused(files, tuned, tmp_path, capsys):
    """TensorStore would read zeros."""
    model = shutil.copytree(files.model, tmp_path / "model")
    part = model / "transformer" / "blocks.ffn.0.weight" / "1.0.0"
    part.unlink()
    out = tmp_path / "out.safetensors"
    for words in (
        ("extract", "--base", model, "--tuned", tuned),
        ("merge", "--lora", files.lora, "--model", model),
        ("convert", "--lora", files.lora, "--model", model),
    ):
        refuses(capsys, r"blocks\.ffn\.0\.weight/1\.0\.0: this part", *words, "--out", out)
    shutil.copy(files.model / "transformer" / "blocks.ffn.0.weight" / "1.0.0", part)
    shutil.rmtree(model / "tokenizer")
    words = ("merge", "--lora", files.lora, "--model", model, "--out", tmp_path / "merged")
    refuses(capsys, "model: has no tokenizer; run wan22-convert", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_large_difference_is_decomposed_as_well_as_by_an_exact_svd():
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(130, 100)))
    right, _ = np.linalg.qr(rng.normal(size=(170, 100)))
    sizes = 0.93 ** np.arange(100)
    difference = ((left * sizes) @ right.T).astype(np.float32)
    names = {f"blocks.0.{t}.weight": difference for t in ("self_attn.q",)}
    base = HeldTensors({name: np.zeros_like(array) for name, array in names.items()})
    assert min(difference.shape) > 4 * (8 + 16)  # so that it is the range finder that works
    found, cuts, _ = lora_algebra.extract_lora(base, HeldTensors(names), rank=8, source="both")
    best = np.sqrt((sizes[8:] ** 2).sum() / (sizes**2).sum())
    rest = difference - delta(found, "blocks.0.self_attn.q.weight")
    assert cuts["self_attn.q"].error == pytest.approx(best, rel=2e-3)
    assert np.linalg.norm(rest) / np.linalg.norm(difference) == pytest.approx(best, rel=2e-3)


def test_loras_of_full_size_have_the_600_names():
    sizes = {"self_attn.q": (30, 3072, 3072), "ffn.0": (30, 14336, 3072)}
    drawn = draw_adapter(sizes, {name: LoRATarget(1, 2.0) for name in sizes})
    cut, _ = lora_algebra.cut_lora(drawn, rank=1)
    assert len(to_tensors(cut, "kohya")) == 2 * 30 * 3
    name = "blocks.29.ffn.0.weight"
    a, b = delta(drawn, name)[::500, ::300], delta(cut, name)[::500, ::300]
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
