"""The shape of the code: who imports whom, how long files get, what must not exist."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "wan22_jax").rglob("*.py"), *(ROOT / "convert").rglob("*.py")])

# Lower may not import higher. A file that is not named here belongs to its folder's layer.
LAYERS = [
    {"wan22_jax", "wan22_jax.errors", "wan22_jax.model", "wan22_jax.data", "wan22_jax.training"},
    {"wan22_jax.toml_file", "wan22_jax.outputs"},
    {"wan22_jax.adapter_targets"},
    {"wan22_jax.geometry", "wan22_jax.batch", "wan22_jax.tensor_files", "wan22_jax.model.shards"}
    | {"wan22_jax.processes", "wan22_jax.spread"},
    {"wan22_jax.sharding"},
    {"wan22_jax.quantised"},
    {"wan22_jax.model.lora", "wan22_jax.model.flow", "wan22_jax.model.rope"}
    | {"wan22_jax.model.attention", "wan22_jax.model.fp8", "wan22_jax.model.remat"},
    {"wan22_jax.model.kernels", "wan22_jax.model.hopper_matmul"},
    {"wan22_jax.model.fused"},
    {"wan22_jax.model.matmul"},
    {"wan22_jax.model.dropped"},
    {"wan22_jax.model.linear"},
    {"wan22_jax.model.layers"},
    {"wan22_jax.model.vae_layers", "wan22_jax.model.embeddings", "wan22_jax.model.block_weights"},
    {"wan22_jax.model.transformer", "wan22_jax.model.vae", "wan22_jax.model.umt5"},
    {"wan22_jax.model.umt5_streamed", "wan22_jax.clip_encoder"},
    {"wan22_jax.weights", "wan22_jax.text", "wan22_jax.sampling", "wan22_jax.data.picture"},
    {"wan22_jax.model_folder", "wan22_jax.data.video_file", "wan22_jax.data.video"}
    | {"wan22_jax.data.captions", "wan22_jax.data.probed", "wan22_jax.training.frozen"},
    {
        "wan22_jax.data.thumbnail",
        "wan22_jax.data.animation",
        "wan22_jax.preview_files",
        "wan22_jax.data.buckets",
        "wan22_jax.data.batching",
        "wan22_jax.data.index",
        "wan22_jax.training.prodigy",
    }
    | {"wan22_jax.training.memory", "wan22_jax.data.cuts", "wan22_jax.data.companions"}
    | {"wan22_jax.training.flops", "wan22_jax.training.events", "wan22_jax.training.status"}
    | {"wan22_jax.training.full", "wan22_jax.training.rounding"}
    | {"wan22_jax.refused_keys"},
    {"wan22_jax.training.wandb_log", "wan22_jax.charts", "wan22_jax.report_samples"},
    {
        "wan22_jax.data.cache",
        "wan22_jax.training.optimizer_options",
        "wan22_jax.training.blockwise",
        "wan22_jax.full_config",
    },
    {"wan22_jax.training.draws"},
    {"wan22_jax.training.ema"},
    {
        "wan22_jax.training.step",
        "wan22_jax.training.metrics",
        "wan22_jax.training.averages",
        "wan22_jax.data.survey",
    },
    {"wan22_jax.data.entries"},
    {"wan22_jax.data.loader", "wan22_jax.data.cache_writer", "wan22_jax.checkpoint"}
    | {"wan22_jax.joint_save"}
    | {"wan22_jax.data.preflight_page"},
    {"wan22_jax.data.eval_clips"},
    {"wan22_jax.training.evaluate"},
    {"wan22_jax.data.upkeep", "wan22_jax.data.preflight"},
    {"wan22_jax.prompts", "wan22_jax.velocity", "wan22_jax.model.vae_tiles"},
    {"wan22_jax.videos"},
    {"wan22_jax.sample_config"},
    {"wan22_jax.dataset_config", "wan22_jax.parallel"},
    {"wan22_jax.lora_names", "wan22_jax.config"},
    {"wan22_jax.adapter"},
    {"wan22_jax.model_tensors", "wan22_jax.adapter_join"},
    {"wan22_jax.full_file", "wan22_jax.proof"},
    {"wan22_jax.dataset", "wan22_jax.training.cadence", "wan22_jax.training.retention"}
    | {"wan22_jax.adapter_file", "wan22_jax.resuming", "wan22_jax.stopping"}
    | {"wan22_jax.training.optimizer", "wan22_jax.start"},
    {"wan22_jax.run_folder", "wan22_jax.saving"},
    {"wan22_jax.examples", "wan22_jax.monitoring", "wan22_jax.run_summary"},
    {"wan22_jax.evaluation", "wan22_jax.previews", "wan22_jax.report"},
    {"wan22_jax.watch"},
    {"wan22_jax.demo_checkpoint", "wan22_jax.demo_clips"},
    {"wan22_jax.train", "wan22_jax.encode", "wan22_jax.sample", "wan22_jax.demo"},
    {"convert", "convert.spiece", "convert.torch_file", "convert.sizes"} | {"convert.download"},
    {"convert.checkpoints", "convert.progress", "convert.written_network"},
    {"convert.weights"},
    {"convert.whole_model"},
    {"convert.export", "convert.lora_algebra"},
    {"convert.lora_tools"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
COMMANDS = {"encode", "train", "sample", "demo"}
MAY_CATCH_ALL = {"previews"}  # no failure of a preview ends a run
BANNED_NAMES = {"utils", "common", "helpers", "misc", "base", "core"}
# What a reader opens to follow a batch from disk to the gradient.
MAIN_PATH = (
    "wan22_jax/data/cache.py",
    "wan22_jax/data/loader.py",
    "wan22_jax/train.py",
    "wan22_jax/training/step.py",
    "wan22_jax/model/transformer.py",
    "wan22_jax/model/linear.py",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names} & set(LAYER_OF)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = module_name(path)
    assert own in LAYER_OF, f"{own}: give it a layer in this test"
    for name in imports_of(path) & set(LAYER_OF):
        ours, theirs = LAYER_OF[own], LAYER_OF[name]
        neighbours = ours == theirs and path.stem not in COMMANDS
        assert theirs < ours or (neighbours and name != own), f"{own} imports {name}"


def test_there_is_no_import_cycle():
    graph = {module_name(path): imports_of(path) & set(LAYER_OF) for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_has_a_telling_name(path):
    assert len(path.read_text().splitlines()) <= 500
    assert path.stem not in BANNED_NAMES
    assert ast.get_docstring(ast.parse(path.read_text())), "the first line says what it answers"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_stays_outside_the_package(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    if path.is_relative_to(ROOT / "wan22_jax"):
        assert not roots & {"torch", "diffusers", "peft", "convert"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_swallowed_or_skipped(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            is_too_wide = ast.unparse(node.type) == "Exception" and path.stem not in MAY_CATCH_ALL
            assert not is_too_wide, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "zip":
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert keywords.get("strict") != "False", f"line {node.lineno}"


def test_the_main_path_is_six_files():
    assert len(MAIN_PATH) == 6
    assert all((ROOT / path).is_file() for path in MAIN_PATH)
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{path.removeprefix('wan22_jax/')}`" in readme for path in MAIN_PATH)
    assert sum(len((ROOT / path).read_text().splitlines()) for path in MAIN_PATH) <= 1500


def test_nothing_large_or_machine_made_is_committed():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for name in listing.stdout.split("\n"):
        path = ROOT / name
        if path.is_file():
            assert path.stat().st_size < 500_000, name
            assert path.suffix not in {".pyc", ".safetensors", ".mp4", ".pth"}, name
