"""Every architecture of open_clip with fewer layers and narrower towers, as folders that open_clip reads."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "[pad]",
    "[end]",
    "[eos]",
    "[sep]",
    "[unk]",
    *["a", "an", "photo", "picture", "of", "the", "red", "green", "blue", "square"],
)
VOCABULARY = 32  # rows of the token table where the tokenizer is one of transformers
DEPTHS = {  # arguments that set how many blocks there are, by the module of timm
    "convnext": {"depths": (1, 1, 1, 1)},
    "swin_transformer": {"depths": (1, 1, 1, 1)},
    "fastvit": {"layers": (1, 1, 1, 1)},
    "five stages": {"layers": (1, 1, 1, 1, 1)},
    "": {"depth": 1},
}
FIVE_STAGES = ("fastvit_mci3", "fastvit_mci4")


@contextmanager
def shallow_timm(monkeypatch):
    """Within this block, timm builds every architecture that open_clip asks for with one block a stage."""
    timm = open_clip.timm_model.timm
    create = timm.create_model

    def shallow(name, **options):
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        depth = DEPTHS["five stages"] if name in FIVE_STAGES else DEPTHS.get(module, DEPTHS[""])
        return create(name, **(depth | options))

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", shallow)
        yield


def shrunk(config: dict) -> dict:
    """The configuration with one layer a tower; widths that must fit each other stay."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        if isinstance(vision["layers"], list):
            vision |= {"layers": [1, 1, 1, 1], "width": 8}
        else:
            vision |= {"layers": 1, "width": 2 * vision.get("head_width", 64)}
    if "hf_model_name" not in text:
        if text.get("proj_type") != "none":
            text |= {"width": 32, "heads": 2}
        text["layers"] = 1
        if text.get("hf_tokenizer_name"):
            text["vocab_size"] = VOCABULARY
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    return config


def tokenizer_files(folder: Path) -> None:
    """A tokenizer of whole words in the layout of transformers."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A [eos] [end]", special_tokens=[("[eos]", 2), ("[end]", 1)]
    )
    roles = {"pad_token": "[pad]", "eos_token": "[eos]", "sep_token": "[sep]", "unk_token": "[unk]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(str(folder))


def preprocess_of(name: str) -> dict:
    """What open_clip states of the preprocessing of an architecture's first public weights."""
    for tag in open_clip.list_pretrained_tags_by_model(name):
        known = open_clip.get_pretrained_cfg(name, tag)
        return {k: known[k] for k in ("mean", "std", "interpolation", "resize_mode") if known.get(k)}
    return {}


def write(folder: Path, config: dict, preprocess: dict) -> torch.nn.Module | None:
    """A folder in the layout of open_clip with random weights; returns open_clip's model of it, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    if config["text_cfg"].get("hf_tokenizer_name"):
        tokenizer_files(folder)
    if config["text_cfg"].get("hf_model_name"):
        return None  # open_clip would download the configuration of its text tower
    muted = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    logging.disable(muted)
    state = {name: value.contiguous().clone() for name, value in net.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return net.eval()
