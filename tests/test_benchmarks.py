"""The benchmarks: they run, count what they say they count, and fail when they should."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan22_jax.geometry import Bucket
from wan22_jax.model.fp8 import quantize_weight
from wan22_jax.model.transformer import TI2V_5B
from wan22_jax.training.flops import count_flops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they import each other as scripts do

import compare  # noqa: E402
import compile_step  # noqa: E402
import fp8_quality  # noqa: E402
import kernel_table  # noqa: E402
import random_model  # noqa: E402
from kernel_table import Kernel  # noqa: E402


@pytest.mark.long
def test_a_train_step_runs_and_its_profile_is_read(tmp_path):
    words = [sys.executable, str(BENCHMARKS / "train_step.py"), "--tiny", "--bucket", "64x64x5"]
    words += ["--batch", "2", "--steps", "1", "--activation_checkpointing", "false"]
    words += ["--trace", str(tmp_path)]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert result["tokens"] == 2 * Bucket(64, 64, 5).num_tokens
    assert np.isfinite(result["loss"])
    assert "fusion" in done.stdout  # of the table
    assert "ms/step in all" in done.stdout


@pytest.mark.long
def test_the_loop_is_timed_against_the_bare_step():
    words = [sys.executable, str(BENCHMARKS / "loop.py"), "--tiny", "--steps", "12"]
    words += ["--dtype", "bfloat16"]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert (result["checkpoints"], len(result["bare_s_all"])) == (2, 2)  # at step 12, and at 15
    assert result["lost_percent"] == pytest.approx(
        100 * (result["loop_s"] / result["bare_s"] - 1), abs=0.5
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="its interpreter came with jax 0.11")
def test_the_matmul_for_hopper_is_right():
    words = [sys.executable, str(BENCHMARKS / "time_matmul.py"), "--interpret"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        # Each warpgroup waits in a thread of its own, and XLA has as many as devices.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=16",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout.rpartition("RESULT ")[2])["error"]
    assert error <= 2.0**-8  # one rounding to bfloat16


def test_flops_at_full_size():
    # By hand: 27,280 tokens, 30 blocks of width 3072 and 14336, 512 text tokens.
    linears = 2 * 27_280 * (6 * 3072**2 + 2 * 3072 * 14336)
    attention = 4 * 27_280**2 * 3072 + 4 * 27_280 * 512 * 3072
    expected = 30 * (2 * linears + 3.5 * attention)
    assert count_flops(TI2V_5B, 27_280) == expected
    trained = count_flops(TI2V_5B, 27_280, trains_weights=True)
    assert trained == expected + 30 * linears
    assert Bucket(1280, 704, 121).num_tokens == 27_280


def test_weights_follow_seed_and_name_and_can_stay_on_the_host():
    config = random_model.TINY

    def weights(**options):
        model = random_model.make_model(config, dtype="bfloat16", **options)
        return [linear.weight[...] for _, linear in model.lora_targets()], model

    first, model = weights(seed=0)
    again, _ = weights(seed=0, on_host=True)
    other, _ = weights(seed=1)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again, strict=True))
    assert not any((a == b).all() for a, b in zip(first, other, strict=True))
    assert all(isinstance(weight, np.ndarray) for weight in again)
    assert all(weight.dtype == jnp.bfloat16 for weight in first)
    assert len({float(weight.ravel()[0]) for weight in first}) == len(first)
    assert model.head.head.weight.dtype == jnp.float32
    random_model.add_lora(model, seed=0, std_b=0.03)
    stds = [float(linear.lora_B[...].std()) for _, linear in model.lora_targets()]
    np.testing.assert_allclose(stds, 0.03, rtol=0.1)


def test_float8_weights_are_the_bfloat16_ones_quantised():
    models = [random_model.make_model(random_model.TINY, dtype=d) for d in ("bfloat16", "float8")]
    pairs = zip(*(model.lora_targets() for model in models), strict=True)
    for (_, plain), (_, quantised) in pairs:
        weight, scale = quantize_weight(plain.weight[...])
        assert (quantised.weight[...] == weight).all()
        assert (quantised.weight_scale[...] == scale).all()


def test_a_stack_is_drawn_layer_by_layer():
    shape = (32, 64, 128)
    draw = random_model._draw.lower(
        jax.random.key(0),
        0.0,
        1.0,
        shape=shape,
        stacked=True,
        dtype=jnp.dtype(jnp.bfloat16),
        quantise=False,
    )
    analysis = draw.compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 8 * 4 * np.prod(shape[1:])  # of 32 layers in float32


def test_kernel_names_are_grouped_and_classed():
    assert kernel_table.short_name("loop_multiply_fusion_12") == "loop_multiply_fusion"
    assert kernel_table.short_name("fusion.3.1") == "fusion"
    assert kernel_table.short_name("MemcpyH2D") == "MemcpyH2D"
    classes = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3": "attention",
        "nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNN": "matmul",
        "matmul_add_mosaic_gpu_kernel": "matmul",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_cublas": "matmul",
        "MemcpyH2D": "copies to, from and on the device",
        "input_transpose_fusion_2": "transpose, slice, copy",
        "loop_multiply_fusion_12": "other",
    }
    assert {name: kernel_table.classify(name) for name in classes} == classes


def test_busy_time_counts_overlap_once():
    # A copy under a matmul, then a gap, then a fusion: 10 + 5 busy of 20 us.
    kernels = [
        Kernel("gemm_1", 0.0, 10_000.0),
        Kernel("MemcpyD2H", 2_000.0, 3_000.0),
        Kernel("fusion_1", 15_000.0, 2_500.0),
        Kernel("fusion_2", 17_500.0, 2_500.0),
    ]
    assert kernel_table.busy_ns(kernels) == 15_000
    text = kernel_table.format_kernels(kernels, num_steps=1)
    assert "busy 75.0% of it, 75.0% without copies" in text
    fusion = next(line for line in text.splitlines() if line.endswith("  fusion"))
    assert fusion.split() == ["0.005", "2.0", "2.5", "27.8%", "fusion"]


def test_compiling_without_cuda_ends_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(compile_step, "find_cuda", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compile_step.py"])
    with pytest.raises(SystemExit) as stop:
        compile_step.main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.err == "CUDA's compiler is missing: pip install 'jax[cuda13]' brings it\n"
    assert not said.out


def test_kernels_are_counted_as_often_as_they_run():
    hlo = """HloModule jit_train_step, is_scheduled=true

%fused_add (param_0: f32[]) -> f32[] {
  %param_0 = f32[] parameter(0)
  ROOT %add.1 = f32[] add(%param_0, %param_0)
}

%body.1 (arg: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %arg = (s32[], bf16[8]{0}) parameter(0)
  %fusion-start.4 = ((f32[30]{0}, s32[]), f32[1]{0}) fusion-start(%arg), calls=%fused_add
  %fusion-done.4 = f32[1]{0} fusion-done(%fusion-start.4)
  %gemm.2 = (bf16[8]{0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$lt$matmul$f8"
  %attention.3 = (bf16[8]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %mpmd_map.4 = bf16[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(train_step)/jvp(jit(multiply_add))/matmul_add/mpmd_map"}
  ROOT %tuple.1 = (s32[], bf16[8]{0}) tuple(%i, %y)
}

%cond.1 (arg: (s32[], bf16[8])) -> pred[] {
  %arg.2 = (s32[], bf16[8]{0}) parameter(0)
  ROOT %loop_compare_fusion.1 = pred[] fusion(%arg.2), kind=kLoop, calls=%fused_compare
}

ENTRY %main.9 (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  %call.7 = bf16[8]{0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(train_step)/transpose(jvp(norm_rope))/pallas_call"}
  %gemm.1 = (bf16[8]{0}, s8[64]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul"
  %copy.5 = bf16[8]{0} copy(%p)
  %while.1 = (s32[], bf16[8]{0}) while(%tuple), condition=%cond.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"30"}}
  ROOT %loop_add_fusion.12 = bf16[8]{0} fusion(%p), kind=kLoop, calls=%fused_add
}
"""
    counts = compile_step.count_kernels(hlo)
    assert counts == {
        ("Triton", "norm_rope"): 1,
        ("cuBLAS", "__cublas$lt$matmul"): 1,
        ("copy", "copy"): 1,
        ("fusion", "loop_add_fusion"): 1,
        ("fusion", "fusion-start"): 30,
        ("cuBLAS, float8", "__cublas$lt$matmul$f8"): 30,
        ("cuDNN", "__cudnn$fmhaSoftmax"): 30,
        ("Mosaic GPU", "matmul_add"): 30,
    }
    lines = [line.split(maxsplit=1) for line in compile_step.format_counts(counts).splitlines()]
    assert lines[:3] == [["31", "fusion"], ["30", "fusion-start"], ["1", "loop_add_fusion"]]


def test_a_child_that_fails_or_hangs_is_a_row(tmp_path):
    def run(text: str, timeout_s: float) -> compare.Row:
        program = tmp_path / "program.py"
        program.write_text(text)
        args = argparse.Namespace(steps=1, tiny=False, cold=False, timeout_s=timeout_s)
        return compare.measure(compare.Run("2304/float8", str(program), ()), args)

    assert run("print('RESULT {\"step_s\": 2}')", 60)["step_s"] == 2
    assert "exit 1: MemoryError: full" in run("raise MemoryError('full')", 60)["error"]
    assert "more than 0.5 s" in run("import time; time.sleep(60)", 0.5)["error"]


def test_a_second_child_starts_from_what_the_first_has_compiled(tmp_path):
    text = """
import json, pathlib, sys
kept = pathlib.Path(sys.argv[sys.argv.index("--cache") + 1], "step")
found = {"first_s": 3.0 if kept.exists() else 30.0, "cached": kept.exists()}
assert "FAILS" not in found or not kept.exists(), "MemoryError"
kept.write_text("")
print("RESULT", json.dumps(found | {"step_s": 2.0, "steps": sys.argv[2]}))
"""

    def run(text: str) -> compare.Row:
        program = tmp_path / "program.py"
        program.write_text(text)
        args = argparse.Namespace(steps=4, tiny=False, cold=False, timeout_s=60)
        return compare.measure(compare.Run("2304/float8", str(program), (), has_cache=True), args)

    row = run(text)
    assert (row["first_s"], row["cached_first_s"], row["steps"]) == (30.0, 3.0, "4")
    row = run(text.replace('found = {"', 'found = {"FAILS": 1, "'))
    assert row["first_s"] == 30.0
    assert "MemoryError" in row["cached_error"]
    row = run(text.replace('kept.write_text("")', ""))
    assert row["cached_error"] == "its step was not in the cache"
    assert "cached_first_s" not in row
    with_cache = {run.name for run in compare.list_steps() if run.has_cache}
    assert with_cache == {f"{tokens}/float8" for tokens in compare.BUCKETS}


def test_ratios_are_to_the_peers_of_the_same_tokens(tmp_path):
    command = "train_step.py --activation_checkpointing true"
    sizes = {"model_tflops": 1.0, "peak_gb": 1.0, "host_gb": 0.0, "first_s": 1.0}
    rows = [
        {"name": "27280/float8", "command": command, "step_s": 2.0, **sizes, "cached_first_s": 7.4},
        {"name": "27280/peer_compiled", "command": command, "step_s": 3.0, **sizes},
        {"name": "27280/peer_eager", "command": command, "error": "out of memory"},
        {"name": "8190/peer_eager", "command": command, "step_s": 9.0, **sizes},
    ]
    table = compare.format_steps(rows).splitlines()[2:]
    assert [cell.strip() for cell in table[0].split("|")[3:6]] == ["2.000", "1.50", ""]
    assert [cell.strip() for cell in table[0].split("|")[9:11]] == ["1", "7"]
    assert "failed: out of memory" in table[2]
    assert len({line.count("|") for line in table}) == 1
    file = tmp_path / "rows.jsonl"
    newer = rows[0] | {"step_s": 1.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, newer]))
    assert compare.read_rows(file)["27280/float8"]["step_s"] == 1.0


def test_one_bad_matrix_fails_the_gradient_check():
    rng = np.random.default_rng(0)
    good = rng.standard_normal((3, 4, 5)).astype(np.float32)
    reference = {"a.lora_A": good, "a.lora_B": good}
    close = {"a.lora_A": 1.01 * good, "a.lora_B": good}
    found = fp8_quality.compare_gradients(reference, close, seed=0)
    verdict = fp8_quality.judge_gradients(found)
    assert verdict["passed"]
    assert verdict["matrices"] == 6
    assert verdict["norm_ratio"] == [1.0, 1.005, 1.01]
    for layer in (np.zeros((4, 5)), good[1] + 0.2 * rng.standard_normal((4, 5))):
        bad = good.copy()
        bad[1] = layer
        found = fp8_quality.compare_gradients(reference, {**close, "a.lora_B": bad}, seed=0)
        verdict = fp8_quality.judge_gradients(found)
        assert not verdict["passed"]
        assert verdict["worst"] == "seed 0, layer 1, a.lora_B"
        both = [
            np.concatenate([tree[name][1] for name in tree]).ravel()
            for tree in ({**close, "a.lora_B": bad}, reference)
        ]
        cosine = both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1])
        np.testing.assert_allclose(verdict["min_layer_cosine"], cosine, atol=1e-5)


def test_curves_are_judged_by_the_spread_of_seeds():
    noise = np.random.default_rng(0).standard_normal((3, 100))
    falling = 2 - np.linspace(0, 1, 100) + 0.1 * noise
    verdict = fp8_quality.judge_curves(falling, falling + 1e-4 * noise[::-1])
    assert verdict["passed"]
    assert verdict["mean_curve_inside"] > 0.9
    assert not fp8_quality.judge_curves(falling, falling + 0.3)["passed"]
    one_seed_off = falling.copy()
    one_seed_off[1, 40:] += 0.3
    assert not fp8_quality.judge_curves(falling, one_seed_off)["passed"]
    flat = 2 + 0.1 * noise
    assert not fp8_quality.judge_curves(flat, flat)["passed"]  # nothing was learned
    picture = fp8_quality.draw_curves({"bfloat16": falling, "float8": one_seed_off})
    assert (0xB0, 0x20, 0x10) in {colour for _, colour in picture.getcolors(1 << 16)}


def test_clips_are_of_low_rank_and_follow_their_seed():
    config = random_model.TINY
    bucket = Bucket(256, 256, 33)
    latents, text = fp8_quality.make_clips(config, bucket, num_clips=2, seed=0)
    assert latents.shape == (2, *bucket.latent_TYX, 48)
    matrix = latents[0].astype(np.float32).reshape(-1, 48)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values[fp8_quality.NUM_WAVES] < 0.02 * values[0]
    np.testing.assert_allclose(matrix.std(), 1, rtol=0.02)
    assert text.shape == (2, config.text_len, config.text_dim)
    other, _ = fp8_quality.make_clips(config, bucket, num_clips=2, seed=1)
    assert (latents != other).any()
