"""wan22-sample: sizes, pictures and files; what it refuses; the whole command on tiny networks."""

import gc
import types
import weakref

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from wan22_jax import sample as command
from wan22_jax import videos
from wan22_jax.adapter import Adapter
from wan22_jax.data.picture import best_output_size, crop_to_cover, open_picture
from wan22_jax.data.video_file import read_metadata
from wan22_jax.demo_checkpoint import TINY_TEXT_ENCODER
from wan22_jax.errors import BadInput
from wan22_jax.model.transformer import TI2V_5B, TransformerConfig, WanTransformer
from wan22_jax.model.vae import VAEConfig, WanVAE
from wan22_jax.model_folder import ModelCard
from wan22_jax.sampling import NEGATIVE_PROMPT
from wan22_jax.velocity import choose_blocks_to_swap

# Made with the original's best_output_size(w, h, 32, 32, 704 * 1280).
OUTPUT_SIZES = {
    (1280, 704): (1280, 704),
    (704, 1280): (704, 1280),
    (1920, 1080): (1248, 704),
    (1080, 1920): (704, 1248),
    (1024, 1024): (960, 928),
    (640, 480): (1088, 800),
    (480, 640): (800, 1088),
    (4000, 1000): (1888, 448),
    (1000, 4000): (448, 1888),
    (1365, 768): (1248, 704),
    (512, 513): (928, 960),
    (300, 199): (1152, 768),
}


@pytest.mark.parametrize("picture", OUTPUT_SIZES)
def test_output_size_is_the_original_choice(picture):
    assert best_output_size(*picture) == OUTPUT_SIZES[picture]


def test_output_size_refuses_a_stripe():
    with pytest.raises(BadInput, match=r"^stripe.png: 4000x2 is too narrow"):
        best_output_size(4000, 2, source="stripe.png")


def test_picture_is_covered_and_cropped_at_the_centre():
    columns = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    frame = crop_to_cover(Image.fromarray(columns), width_px=64, height_px=64)
    assert frame.shape == (1, 1, 64, 64, 3)
    assert frame.dtype == np.float32
    np.testing.assert_allclose(frame[0, 0, :, :, 0], columns[:, 96:160, 0] / 127.5 - 1, atol=1e-6)

    # Lanczos, sizes rounded: 100 x 37 * (32 / 37) = 86 x 32, of which columns 27 to 58 stay.
    noise = np.random.default_rng(0).integers(0, 256, (37, 100, 3), dtype=np.uint8)
    scaled = Image.fromarray(noise).resize((86, 32), Image.Resampling.LANCZOS)
    frame = crop_to_cover(Image.fromarray(noise), width_px=32, height_px=32)
    np.testing.assert_allclose(frame[0, 0], np.asarray(scaled)[:, 27:59] / 127.5 - 1, atol=1e-6)


def test_picture_is_opened_upright_and_on_white(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (20, 40)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_bytes_are_cut_off_not_rounded():
    video = jnp.array([-3.0, -1, -0.5, 0, 0.5, 0.999, 1, 7]).reshape(1, 1, 1, 8, 1).repeat(3, -1)
    wanted = [0, 0, 63, 127, 191, 254, 255, 255]  # 63.75, 127.5, 191.25, 254.87
    (found,) = videos.fetch_video([video])
    assert found[0, 0, :, 1].tolist() == wanted


TRANSFORMER = TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8,
    text_len=512, freq_dim=8,
)  # fmt: skip
VAE = VAEConfig(
    encoder_dim=4, decoder_dim=4, z_dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1,
    latents_mean=(0.1,) * 4, latents_std=(0.9,) * 4,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformer():
    return make_random(WanTransformer, TRANSFORMER)


@pytest.fixture(scope="module")
def vae():
    return make_random(WanVAE, VAE)


def make_random(network, config):
    """Fills a network from NumPy: its own initialisation compiles for every shape."""
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


@pytest.fixture
def model(monkeypatch, tmp_path, transformer, vae):
    """Puts tiny networks in place of a model folder; returns what they were asked for."""
    asked = types.SimpleNamespace(prompts=[], dtypes=[], digests=[], sampled=[], loaded=[])
    asked.vae_dtypes = []
    asked.stored = "bfloat16"

    def read_model_card(folder):
        if folder != tmp_path / "model":
            raise BadInput(f"{folder}: not a model folder")
        return ModelCard(
            dtype=asked.stored,
            source="",
            transformer=TRANSFORMER,
            vae=VAE,
            text_encoder=TINY_TEXT_ENCODER,
            digests={"transformer": "abc"},
            digest="def",
        )

    def encode_each(encoders, _tokenizer, prompts, *, at_once):
        assert at_once == min(8, len(prompts))
        assert encoders == ["encoder"]
        asked.prompts.extend(prompts)
        return [
            np.asarray(jax.random.normal(jax.random.key(len(text)), (i + 3, 8)))
            for i, text in enumerate(prompts)
        ]

    def load_fitting_text_encoder(_, *, dtype, memory_bytes):
        assert memory_bytes is None  # of a CPU
        asked.dtypes.append(dtype)
        return "encoder"

    def load_transformer(_, *, dtype, host):
        assert host
        asked.dtypes.append(dtype)
        return load(transformer)

    def load_vae(_, *, dtype):
        asked.vae_dtypes.append(dtype)
        return load(vae)

    def load(network):
        assert all(loaded() is None for loaded in asked.loaded), "two networks in memory"
        graphdef, state = nnx.split(network)
        state = jax.tree.map(jnp.copy, state)
        asked.loaded.append(weakref.ref(jax.tree.leaves(state)[-1]))
        return nnx.merge(graphdef, state)

    def load_adapter(path, *, base_digest):
        asked.digests.append((str(path), base_digest))
        rng = np.random.default_rng(1)
        shapes = {"lora_A": (2, 3, 24), "lora_B": (2, 24, 3)}
        matrices = {
            f"blocks.self_attn.v.{side}": rng.normal(size=shape).astype(np.float32)
            for side, shape in shapes.items()
        }
        return Adapter(matrices, {"self_attn.v": 6.0}, metadata={}, source=str(path))

    def sample_latents(*arguments, **options):
        asked.sampled.append(options)
        asked.latents = original(*arguments, **options)
        return asked.latents

    original = videos.sample_latents
    monkeypatch.setattr(command, "read_model_card", read_model_card)
    monkeypatch.setattr(videos, "load_tokenizer", lambda _: "tokenizer")
    monkeypatch.setattr(videos, "load_fitting_text_encoder", load_fitting_text_encoder)
    monkeypatch.setattr(videos, "encode_each", encode_each)
    monkeypatch.setattr(videos, "is_cut", lambda *_: False)
    monkeypatch.setattr(command, "load_transformer", load_transformer)
    monkeypatch.setattr(command, "load_vae", load_vae)
    monkeypatch.setattr(command, "load_adapter", load_adapter)
    monkeypatch.setattr(videos, "sample_latents", sample_latents)
    asked.flags = ["--model", str(tmp_path / "model"), "--prompt", "a red ball"]
    asked.flags += ["--out", str(tmp_path / "new" / "out.mp4"), "--steps", "2"]
    gc.disable()  # so that only what the command frees is free
    yield asked
    gc.enable()


def run(*flags):
    command.sample(command.parse_arguments(flags))


def read_frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_text_to_video(model, tmp_path, capsys):
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "5"]
    run(*flags, "--seed", "3")
    assert read_frames(tmp_path / "new" / "out.mp4").shape == (5, 32, 64, 3)
    assert model.prompts == ["a red ball", NEGATIVE_PROMPT]
    assert model.dtypes == ["bfloat16", "bfloat16"]
    assert model.latents.shape == (1, 2, 2, 4, 4)
    assert (model.sampled[0]["solver"], model.sampled[0]["shift"]) == ("unipc", 5.0)
    assert model.sampled[0]["guidance"] == 5.0
    assert "seed 3" in capsys.readouterr().out


@pytest.mark.long
def test_devices_share_the_tokens_of_a_video(model, capsys):
    flags = [*model.flags, "--width", "96", "--height", "32", "--frames", "1", "--seed", "3"]
    run(*flags, "--dtype", "float32", "--devices", "1")
    assert "devices share" not in capsys.readouterr().out
    alone = model.latents
    run(*flags, "--dtype", "float32", "--devices", "3", "--blocks_to_swap", "1")
    assert "2 of 8 devices share each video" in capsys.readouterr().out  # of two heads
    np.testing.assert_allclose(model.latents, alone, atol=1e-4)
    with pytest.raises(
        BadInput, match=r"--devices 9: this process sees 8 \(cpu\); expected 1 to 8"
    ):
        run(*flags, "--devices", "9")


def test_out_chooses_the_format(model, tmp_path, capsys):
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "5"]
    for name, seen in {"a.gif": "a.gif", "a.webp": "a.webp", "a.png": "a"}.items():
        run(*flags, "--out", str(tmp_path / name))
        assert f"{tmp_path / seen}: 5 frames of 64x32" in capsys.readouterr().out
        with Image.open(tmp_path / seen / "0004.png" if seen == "a" else tmp_path / seen) as image:
            assert (image.size, getattr(image, "n_frames", 1)) == (
                (64, 32),
                1 if seen == "a" else 5,
            )
    run(*flags, "--out", str(tmp_path / "still.png"), "--frames", "1")
    assert (tmp_path / "still.png").is_file()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    model.dtypes.clear()
    with pytest.raises(BadInput, match=r"a: frames would replace this folder, but notes\.txt"):
        run(*flags, "--out", str(tmp_path / "a.png"))
    assert model.dtypes == []


def test_seed_negative_prompt_and_lora_each_change_the_video(model):
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "5"]
    settings = [
        ["--seed", "3"],
        ["--seed", "4"],
        ["--seed", "4", "--negative_prompt", "blue", "--dtype", "float32"],
        ["--seed", "4", "--negative_prompt", "blue", "--lora", "run"],
    ]
    seen = []
    for more in settings:
        run(*flags, *more)
        assert all(np.abs(model.latents - latents).max() > 1e-3 for latents in seen)
        seen.append(model.latents)
    assert model.prompts[4:6] == ["a red ball", "blue"]
    assert model.dtypes[4:6] == ["float32", "float32"]
    assert model.digests == [("run", "abc")]


def test_image_to_video_starts_with_the_picture(model, vae, tmp_path):
    picture = np.random.default_rng(5).integers(0, 256, (70, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    run(*model.flags, "--image", str(tmp_path / "first.png"), "--width", "70", "--height", "30",
        "--frames", "5", "--solver", "dpm++", "--shift", "3", "--guidance", "2")  # fmt: skip
    asked = model.sampled[0]
    assert [asked[k] for k in ("solver", "shift", "guidance", "steps")] == ["dpm++", 3.0, 2.0, 2]
    width_px, height_px = best_output_size(40, 70, area_px=70 * 30)
    assert (width_px, height_px) == (32, 64)
    assert read_frames(tmp_path / "new" / "out.mp4").shape == (5, height_px, width_px, 3)
    frame = crop_to_cover(Image.fromarray(picture), width_px=width_px, height_px=height_px)
    wanted = next(vae.encode_chunks([jnp.asarray(frame)]))
    np.testing.assert_allclose(model.latents[:, :1], wanted, atol=1e-5)
    assert np.abs(wanted).max() > 0.1
    assert np.abs(model.latents[:, 1:]).max() > 0.1
    assert len(model.loaded) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", " "], "--prompt: a text was expected"),
        (["--width", "100"], "width 100 is not a multiple of 32 pixels; use 96"),
        (["--frames", "120"], r"120 frames is not 4n\+1"),
        (["--prompt", "a cat", "a dog --w 100"], "a dog: width 100 is not a multiple of 32"),
        (["--prompt", "a dog --x 3"], "--prompt: --x is no switch of a prompt"),
        (["--lora", "run:nan"], "--lora run:nan: a strength is a number"),
        (["--blocks_to_swap", "-1"], "--blocks_to_swap: 0 or more expected"),
        (["--vae_tile", "100"], "--vae_tile: a multiple of 16 from 64 expected, got 100"),
        (["--steps", "0"], "--steps: 1 or more expected"),
        (["--shift", "0"], "--shift: a number over 0 expected"),
        (["--guidance", "nan"], "--guidance: a number expected"),
        (["--seed", "-2"], "--seed: 0 or more expected"),
        (["--out", "clip.avi"], r"clip.avi: --out takes an \.mp4, \.gif, \.webp or \.png file"),
        (["--image", "absent.png"], "absent.png: no such picture"),
        (["--model", "elsewhere"], "elsewhere: not a model folder"),
    ],
)
def test_refuses_before_it_loads_a_network(model, flags, message):
    with pytest.raises(BadInput, match=message):
        run(*model.flags, *flags)
    assert model.dtypes == []


def test_a_float8_model_is_sampled_as_it_is(model):
    model.stored = "float8"
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "1"]
    with pytest.raises(BadInput, match="its transformer is float8 and was to be loaded as float32"):
        run(*flags, "--dtype", "float32")
    assert model.dtypes == []
    run(*flags)
    assert model.dtypes == ["bfloat16", "float8"]


def test_refuses_what_is_no_picture(model, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(BadInput, match=r"text.png: expected a picture"):
        run(*model.flags, "--image", str(tmp_path / "text.png"))
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg", quality=100)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:500])
    with pytest.raises(BadInput, match=r"cut.jpg: expected a picture"):
        run(*model.flags, "--image", str(tmp_path / "cut.jpg"))


def test_refusal_is_one_line_and_code_2(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["wan22-sample", *model.flags, "--steps", "0"])
    assert command.main() == 2
    assert capsys.readouterr().err == "error: --steps: 1 or more expected, got 0; 50 is usual\n"


def test_several_prompts_seeds_and_switches(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 32 --f 1 --s 1\na dog --d 7 --g 1 --fs 3 --n green\n")
    picture = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    with file.open("a") as more:
        more.write("a cow --i first.png --w 64 --d 8\n")
    flags = [
        *model.flags[:2],
        "--prompts",
        str(file),
        "--out",
        str(tmp_path / "v.gif"),
        "--w",
        "64",
    ]
    run(*flags, "--h", "32", "--f", "5", "--s", "2", "--d", "1", "2", "--n", "blue")
    names = ["v_00_seed1", "v_01_seed2", "v_02_seed7", "v_03_seed8"]
    assert sorted(path.name for path in tmp_path.glob("v*")) == [f"{name}.gif" for name in names]
    cat, other, dog, cow = (read_metadata(tmp_path / f"{name}.gif") for name in names)
    assert (cat["width"], cat["frames"], cat["steps"], cat["negative"]) == (32, 1, 1, "blue")
    assert cat | {"seed": 2} == other
    assert (dog["guidance"], dog["shift"], dog["negative"], dog["steps"]) == (1, 3, "", 2)
    assert (cow["width"], cow["height"], cow["image"]) == (64, 32, str(tmp_path / "first.png"))
    assert cow["model"] == "def"
    assert model.prompts == ["a cat", "blue", "a dog", "a cow"]  # each once, green not at all
    assert [each["first_frame"] is None for each in model.sampled] == [True, True, True, False]
    assert "denoise" in capsys.readouterr().err


def test_loras_add_up_with_their_strengths(model):
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "1", "--seed", "3"]
    latents = []
    for more in (["run"], ["run:0.5", "run:0.5"], ["run:0"], []):
        run(*flags, *(["--lora", *more] if more else []))
        latents.append(model.latents)
    together, halves, none, without = latents
    np.testing.assert_allclose(halves, together, atol=1e-5)
    np.testing.assert_allclose(none, without, atol=1e-6)
    assert np.abs(together - without).max() > 1e-3


def test_a_lora_of_another_model_is_refused_before_a_network_is_loaded(model, monkeypatch):
    def load_adapter(path, *, base_digest):
        assert base_digest == "abc"
        matrices = {
            "blocks.ffn.0.lora_A": np.ones((2, 3, 9)),
            "blocks.ffn.0.lora_B": np.ones((2, 32, 3)),
        }
        return Adapter(matrices, {"ffn.0": 6.0}, metadata={}, source=str(path))

    monkeypatch.setattr(command, "load_adapter", load_adapter)
    with pytest.raises(
        BadInput, match=r"run: is not a LoRA of this model \(blocks.ffn.0.lora_A is"
    ):
        run(*model.flags, "--lora", "run")
    assert model.dtypes == []


def test_weights_that_wait_on_the_host_change_nothing(model):
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "5", "--seed", "3"]
    latents = []
    for swap in ("0", "1", "2"):
        run(*flags, "--blocks_to_swap", swap)
        latents.append(model.latents)
    np.testing.assert_array_equal(latents[0], latents[1])
    np.testing.assert_array_equal(latents[0], latents[2])


def test_tiles_are_noted_and_reach_the_decoder(model, tmp_path, monkeypatch):
    def decode_tiles(decode_chunks, latents_BTYXC, *, tile_px):
        asked.append(tile_px)
        return decode_chunks(latents_BTYXC)

    asked = []
    monkeypatch.setattr(command, "decode_tiles", decode_tiles)
    flags = [*model.flags, "--width", "64", "--height", "32", "--frames", "5", "--seed", "3"]
    run(*flags, "--vae_tile", "64")
    assert asked == [64]
    assert read_metadata(tmp_path / "new" / "out.mp4")["vae_tile"] == 64


def test_no_more_blocks_wait_than_have_to():
    def choose(memory_gb, dtype="bfloat16"):
        bytes_ = None if memory_gb is None else int(memory_gb * 1e9)
        return choose_blocks_to_swap(TI2V_5B, dtype=dtype, num_tokens=27280, memory_bytes=bytes_)

    assert choose(None) == choose(80) == choose(16) == choose(11, "float8") == 0
    assert 0 < choose(12) < choose(8) < choose(6) < 30
    assert choose(1) == 30
