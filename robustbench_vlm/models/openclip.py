"""open_clip architectures and weights -> `Clip`. The only file that imports open_clip."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from robustbench_vlm.errors import WeightsError, nearest
from robustbench_vlm.models.clip import Clip, ModelFacts, Preprocess
from robustbench_vlm.models.model_ids import CONFIGS

SCHEMAS = ("hf-hub:", "local-dir:")


open_clip.add_model_config(CONFIGS)


def architectures() -> list[str]:
    """Names of every architecture that can be built, those of `configs/` included."""
    return sorted(open_clip.list_models())


def config(arch: str) -> dict[str, Any] | None:
    """The open_clip configuration of an architecture, without building it; `None` if there is none."""
    if arch not in open_clip.list_models():
        return None
    found: dict[str, Any] = open_clip.get_model_config(arch)
    return found


class Language(nn.Module):
    """The text tower of an open_clip model: token ids (N, L) int64 -> embeddings (N, D)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        del self.net.visual, self.net.logit_scale  # neither belongs to the fingerprint of the text tower

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, L) -> text embeddings (N, D), not unit length."""
        embeddings: Tensor = self.net.encode_text(tokens)  # type: ignore[operator]
        return embeddings


def build(arch: str, *, quick_gelu: bool = False) -> Clip:
    """A model of architecture `arch` with random weights drawn from a fixed seed.

    Args:
        arch: an open_clip name, or the `hf-hub:` or `local-dir:` whose config describes it.
        quick_gelu: force the activation of the OpenAI weights.

    Raises:
        WeightsError: no such architecture.
    """
    if not arch.startswith(SCHEMAS) and arch not in open_clip.list_models():
        raise WeightsError(
            f"model {arch!r}", "no such open_clip architecture", do=nearest(arch, architectures())
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = _create(arch, None, quick_gelu=quick_gelu, weights=False)
    return _wrap(net, arch)


def load(name: str) -> Clip:
    """`ARCH:TAG` (weights by tag; `ARCH:random` for fixed random ones), `hf-hub:ORG/NAME`, `local-dir:PATH`.

    The tag decides the activation: weights that were trained with QuickGELU always run with it.

    Raises:
        WeightsError: unknown architecture or tag, or the weights cannot be had.
    """
    if name.startswith(SCHEMAS):  # the activation is in their own config
        return _wrap(_create(name, None, quick_gelu=False, weights=True), name)
    arch, _, tag = name.partition(":")
    if tag in ("", "random"):
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(arch)
            raise WeightsError(
                f"model {name!r}",
                "an architecture without weights",
                "ARCH:TAG",
                nearest("", tags or ["random"]),
            )
        return build(arch)
    if arch not in open_clip.list_models():
        raise WeightsError(f"model {name!r}", "no such architecture", do=nearest(arch, architectures()))
    known = open_clip.get_pretrained_cfg(arch, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        raise WeightsError(f"model {name!r}", f"no weights tagged {tag!r} for {arch}", do=nearest(tag, tags))
    quick = bool(known.get("quick_gelu", False) or open_clip.get_model_config(arch).get("quick_gelu", False))
    return _wrap(_create(arch, tag, quick_gelu=quick, weights=True), arch)


def _create(name: str, tag: str | None, *, quick_gelu: bool, weights: bool) -> nn.Module:
    muted = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns of random weights on the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the activation is decided above
            net: nn.Module = open_clip.create_model(
                name,
                pretrained=tag,
                precision="fp32",
                force_quick_gelu=quick_gelu,
                load_weights=weights,
                require_pretrained=weights,
                weights_only=True,
            )
    except Exception as error:  # open_clip loads many formats; their errors have no base class in common
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"model {name}{':' + tag if tag else ''}", reason, do="see `vlmrob doctor`"
        ) from error
    finally:
        logging.disable(muted)
    return net.eval()


@cache
def _tokenizer(arch: str) -> Any:  # noqa: ANN401 - open_clip's, of several classes
    """The tokenizer of an architecture; parsing its merges takes longer than building a small model."""
    return open_clip.get_tokenizer(arch)


def _wrap(net: nn.Module, arch: str) -> Clip:
    visual: Any = net.visual
    config = visual.preprocess_cfg
    size = visual.image_size
    side = int(size[0] if isinstance(size, tuple | list) else size)
    scale = float(net.logit_scale.detach().exp())  # type: ignore[operator, union-attr]
    quick_gelu = any(isinstance(part, QuickGELU) for part in net.modules())
    language = Language(net).requires_grad_(False)
    return Clip(
        visual=visual,
        language=language,
        tokenize=_tokenizer(arch),
        preprocess=Preprocess(side, tuple(config["mean"]), tuple(config["std"])),
        logit_scale=scale,
        facts=ModelFacts(arch, quick_gelu),
    )
