"""The curves of a run at Weights & Biases, for those who ask for it under [monitoring].

The package ``wandb`` is an optional extra and imported only then; it sends in the background.
"""

import hashlib
from pathlib import Path
from typing import Any

from wan22_jax.errors import BadInput
from wan22_jax.training.events import EPOCH_LOSS


class WandbLog:
    """One run at Weights & Biases; a resumed run goes on with its own."""

    def __init__(
        self, run_dir: Path, *, api_key: str | None, project: str, name: str, config: dict[str, Any]
    ):
        """Logs in and starts, or goes on with, the run.

        Args:
            run_dir: its folder; the id at Weights & Biases is made from its name.
            api_key: of the account; None: the one that ``wandb login`` or WANDB_API_KEY gave.
            project: where it is listed, ``wandb_tracker_name``.
            name: what it is called there.
            config: shown with it; holds no secrets.

        Raises:
            BadInput: the package is missing, or Weights & Biases cannot be reached or refuses.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise BadInput(
                "[monitoring] enable_wandb = true needs the package wandb: "
                "pip install 'wan22-jax[wandb]', or set it to false"
            ) from None
        run_id = hashlib.sha256(f"{project}/{name}/{run_dir.name}".encode()).hexdigest()[:16]
        try:
            if api_key is not None:
                wandb.login(key=api_key)
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=config,
            )
        except wandb.Error as error:
            raise BadInput(
                f"[monitoring]: Weights & Biases refused the run ({error}); mend the key or the "
                "connection, or set enable_wandb = false"
            ) from error
        # After a kill the steps since the last checkpoint come a second time: as an x value they
        # may, as wandb's own step they would be dropped.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric(EPOCH_LOSS, step_metric="epoch")

    def write(self, values: dict[str, float], step: int) -> None:
        """Sends values of a step under their TensorBoard names."""
        self._run.log({**values, "step": step})

    def write_epoch(self, loss: float, epoch: int, step: int) -> None:
        """Sends the mean loss of an epoch that ended with this step."""
        self._run.log({EPOCH_LOSS: loss, "epoch": epoch, "step": step})

    def finish(self, *, failed: bool) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=1 if failed else 0)
