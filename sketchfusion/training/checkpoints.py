"""The state of a run that goes on after a kill, and the heads of a finished one: safetensors, never pickles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import LoadError, SketchFusionError
from ..files import staged, write_tensors
from ..loading import Access, PathLike, find_checkpoint
from ..model import SketchFusion
from ..tasks import Task
from ..tasks.recognition import Recognition, make_head

STATE = "training.safetensors"
HEAD = "head.safetensors"


class State:
    """What a run needs to go on: trained weights, heads, the optimiser's moments and the scaler, after so many steps.

    Everything random in a run is drawn from the seed and the step, so no state of a generator has to be kept.

    Args:
        folder: of the run.
        run: what it is, by name (see `loop.identity`); the state of another run is refused.
        module: its parameters that require gradients are kept, and the buffers of its `tasks`, such as running means.
        optimizer: AdamW over just these.
        scaler: of the gradients, in float16.
    """

    def __init__(
        self,
        folder: Path,
        run: dict[str, str],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.path, self.run, self.optimizer, self.scaler = folder / STATE, run, optimizer, scaler
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        whole = module.state_dict().keys()  # without buffers that are made anew
        self.buffers = {name: b for name, b in module.named_buffers() if name.startswith("tasks.") and name in whole}

    def save(self, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
        for name, buffer in self.buffers.items():
            tensors[f"buffer.{name}"] = buffer.detach().cpu().contiguous()
        scaling = {} if self.scaler is None else {"scaler": json.dumps(self.scaler.state_dict())}
        write_tensors(tensors, self.path, {"step": str(step), "run": json.dumps(self.run)} | scaling)

    @torch.no_grad()
    def resume(self) -> int:
        """The number of steps done: 0 where there is no state.

        Raises:
            SketchFusionError: the folder holds the state of another run, or a damaged one.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._check_same(json.loads(metadata.get("run", "{}")))
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
                    moments = {key: file.get_tensor(f"{key}.{name}") for key in keys}
                    moved = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
                    self.optimizer.state[parameter] = moved
                for name, buffer in self.buffers.items():
                    buffer.copy_(file.get_tensor(f"buffer.{name}"))
                if self.scaler is not None:
                    self.scaler.load_state_dict(json.loads(metadata["scaler"]))
                return int(metadata["step"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SketchFusionError(f"{self.path} is damaged ({error}): delete it to begin afresh") from error

    def _check_same(self, other: dict[str, str]) -> None:
        differing = [name for name in self.run if other.get(name) != self.run[name]]
        if not differing:
            return
        digested = ("configuration", "tasks or images", "backbones", "weights to begin with")
        named = [f"other {name}" if name in digested else f"{name}={other.get(name)}" for name in differing]
        hints = {
            "weights to begin with": "a model that was trained meanwhile has to be loaded again; one that begins at "
            "random needs torch.manual_seed before it is built",
            "tasks or images": "an image that stopped a run has to be replaced under its name for the run to go on",
        }
        hint = "".join(f" ({words})" for name, words in hints.items() if name in differing)
        raise SketchFusionError(
            f"{self.path.parent} holds another run, with {', '.join(named)}: name another folder, or delete "
            f"{self.path.name} to begin afresh there{hint}"
        )


def save_finetuned(model: SketchFusion, folder: Path) -> None:
    """Put fine-tuned weights in the place of the original ones that `save_pretrained` copied into the checkpoint.

    What never runs (decoder, last up block) stays as it was published, so the folders are complete for their libraries.

    Raises:
        SketchFusionError: the folder cannot be written to.
    """
    whole = UNet2DConditionModel.from_pretrained(folder / "diffusion" / "unet", torch_dtype=torch.float32)
    whole.load_state_dict(model.diffusion.unet.state_dict(), strict=False)
    with staged(folder) as stage:
        whole.save_pretrained(stage / "diffusion" / "unet")
        model.semantic.model.save_pretrained(stage / "semantic")
    model._moved(folder)


def save_head(task: Task, folder: Path) -> None:
    """Write the head of a recognition task beside the checkpoint: weights, classes and shape in one file."""
    if not isinstance(task, Recognition):
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in task.head.state_dict().items()}
    write_tensors(tensors, folder / HEAD, {"task": task.name, "classes": json.dumps(task.classes)})


def load_head(
    source: PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
) -> tuple[nn.Module, tuple[str, ...]]:
    """The recognition head that training wrote into a checkpoint folder, in eval mode, and its classes.

    Args:
        source: the folder, or a Hub repository that such a folder was uploaded to.
        revision, token, cache_dir, local_files_only: as for `SketchFusion.from_pretrained`.

    Returns:
        A module (N, D) -> (N, classes) on the CPU, as the features of a list are, and the classes' names in the order
        of the logits.

    Raises:
        LoadError: there is none, or it is damaged.
    """
    place = find_checkpoint(source, revision, Access(token, cache_dir, local_files_only))
    path = place.safetensors(HEAD)
    try:
        with safe_open(path, framework="pt") as file:
            classes = tuple(json.loads((file.metadata() or {})["classes"]))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        hidden, width = weights["1.weight"].shape
        head = make_head(width, len(classes), hidden if "4.weight" in weights else None)
        head.load_state_dict(weights)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path} is no head that training wrote: {error}") from error
    return head.eval(), classes
