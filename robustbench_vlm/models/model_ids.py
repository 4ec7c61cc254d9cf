"""What a model id can be, and what it names on this machine; decided without importing torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from robustbench_vlm.cards import reader
from robustbench_vlm.errors import WeightsError, nearest

PACKAGED = Path(__file__).parent.parent / "weights"
CONFIGS = Path(__file__).parent / "configs"
"""Configurations of this package's own architectures, as open_clip reads them."""

HUB, LOCAL = "hf-hub:", "local-dir:"
"""Prefixes of ids whose configuration lies beside the weights: on the hub, or in a folder."""

CONVERT = "vlmrob convert FILE --arch ARCH:TAG --out DIR"
"""What makes a folder of vlmrob of weights in another format."""

WEIGHTS = (".pt", ".pth", ".pth.tar", ".bin", ".safetensors")
"""Ends of the names of weights files."""


def packaged() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/card.json"))


def folder_of(name: str) -> Path | None:
    """The checkpoint folder called `name`: a path that has a card, or a packaged checkpoint."""
    if (Path(name) / "card.json").is_file():
        return Path(name)
    return PACKAGED / name if name in packaged() else None


def is_weights(name: str) -> bool:
    """Whether a model id is the name of a weights file."""
    return name.lower().endswith(WEIGHTS)


def run_of_step(name: str) -> Path | None:
    """The folder of the run if a model id is one of its saved steps, `RUN/checkpoints/step_N.safetensors`."""
    path = Path(name)
    is_step = path.parent.name == "checkpoints" and path.name.startswith("step_")
    return path.parents[1] if is_step and path.suffix == ".safetensors" else None


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers: config.json, and no config of open_clip."""
    return (folder / "config.json").is_file() and not (folder / "open_clip_config.json").exists()


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds a model in the layout of open_clip, and no checkpoint of this package."""
    return (folder / "open_clip_config.json").is_file() and not (folder / "card.json").exists()


def architectures() -> set[str]:
    """Every architecture name that open_clip can build, and this package's own."""
    spec = importlib.util.find_spec("open_clip")
    folders = [CONFIGS]
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent / "model_configs")
    return {path.stem for folder in folders for path in folder.glob("*.json")}


def require(name: str) -> None:
    """Refuse an id that names nothing; whether its weights can be loaded is not looked at.

    Raises:
        WeightsError: nothing of that name; the message gives the nearest names.
    """
    listed, path = reader.names("models"), Path(name)
    is_folder = folder_of(name) is not None or is_transformers(path) or is_open_clip(path)
    if is_folder or reader.has("models", name) or is_weights(name) or ":" in name or name in architectures():
        return
    see = "see vlmrob list models, or train a model: vlmrob train mmt-ard"
    if path.exists():
        found = "no card.json in it" if path.is_dir() else "not a file of weights that is known by its name"
        expected = f"a checkpoint folder that vlmrob wrote, or a file that ends in {', '.join(WEIGHTS)}"
        renamed = f"if it is a file of torch, rename it to {path.stem}.pt"
        raise WeightsError(f"model {name!r}", found, expected, renamed if path.suffix == ".ckpt" else see)
    meant = _other_spelling(name)
    if meant:
        raise WeightsError(f"model {name!r}", "no such model or folder", "an id, ARCH:TAG or a folder", meant)
    if "/" in name:
        expected = f"a checkpoint folder (below {Path.cwd()}, if not a full path) or hf-hub:ORG/NAME"
        raise WeightsError(f"model {name!r}", "no such model or folder", expected, see)
    known = [*packaged(), *listed, "ViT-B-32:openai", "ViT-L-14:openai"]
    expected = "an id, ARCH:TAG or a folder"
    raise WeightsError(f"model {name!r}", "no such model or folder", expected, nearest(name, known))


def _other_spelling(name: str) -> str:
    """What to type for the name that another library gives to a model; empty if it is none."""
    dashed = name.replace("/", "-").replace("@", "-").removesuffix("px")
    if dashed in architectures() and dashed != name:  # ViT-B/32 and ViT-L/14@336px, as the OpenAI package
        return f"did you mean {dashed + ':openai'!r}?"
    if name.startswith("openai/clip-"):  # a repository of transformers on the hub
        folder = name.rpartition("/")[2]
        return f"type: hf download {name} --local-dir {folder}, and name that folder"
    return ""
