"""Test-wide settings: eight CPU devices, exact matmuls, no silent rank promotion, nothing kept."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
# The last two: compiling is most of the time that tests take, and without them five times as much.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A worker that began one of these last would be alone for minutes.
_LONGEST = (
    "whole_runs", "step", "train", "full", "demo", "resume", "saving", "encode_benchmark", "calls",
    "averages", "diffusion_pipe_configs", "examples", "convert", "conversion", "sources",
    "export_formats", "lora_tools", "sample_command", "evaluate", "data_fuzz", "remat", "vae",
    "previews", "process_runs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has the files that take longest begin first."""
    first = {f"test_{name}.py": index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny checkpoint in the official layout; not to be written to."""
    from wan22_jax.demo_checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("official")
    write_checkpoint(folder, captions=["a cat"])
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """What the module's ``folder`` holds but for runs, linked into the working directory."""
    for path in folder.iterdir():
        if path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
