"""open_clip architectures and weights -> `Clip`. Only this file and `configuration` import open_clip."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from robustbench_vlm import store
from robustbench_vlm.errors import InputError, WeightsError, nearest
from robustbench_vlm.models import configuration, downloads, loaded_towers, model_ids, patches
from robustbench_vlm.models.clip import Clip, ModelFacts
from robustbench_vlm.models.model_ids import CONFIGS, HUB, LOCAL
from robustbench_vlm.models.preprocess import of_open_clip

SCHEMAS = (HUB, LOCAL)
KEYS = 160  # letters of the names of tensors that do not fit
Tokenize = Callable[[list[str]], Tensor]

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
        for name in ("visual", "logit_scale", "logit_bias", "text_decoder"):  # no part of a text embedding
            if name in net._modules or name in net._parameters:
                delattr(self.net, name)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, L) -> text embeddings (N, D) of any length."""
        found = self.net.encode_text(tokens)  # type: ignore[operator]
        embeddings: Tensor = found[0] if isinstance(found, tuple) else found  # with text_cfg.output_tokens
        return embeddings


def build(
    arch: str,
    *,
    quick_gelu: bool = False,
    tag: str = "",
    stated: Mapping[str, Any] | None = None,
    tokenize: Tokenize | None = None,
) -> Clip:
    """A model of architecture `arch` with random weights drawn from a fixed seed; nothing is downloaded.

    Args:
        arch: an open_clip name, or the `hf-hub:` or `local-dir:` whose configuration describes it.
        quick_gelu: force the activation of the OpenAI weights.
        tag: of weights whose activation and preprocessing it has; empty for none.
        stated: the configuration; by default that of `arch`.
        tokenize: the tokenizer; by default that of the configuration.

    Raises:
        WeightsError: no such architecture or tag, or a configuration that is not on this machine.
    """
    where = f"model {arch}"
    preprocess: Mapping[str, Any] = {}
    if stated is not None:
        configuration.require_local(stated, where)
    elif arch.startswith(LOCAL):
        stated, preprocess = configuration.read(Path(arch.removeprefix(LOCAL)))
    elif arch.startswith(HUB):
        stated, preprocess = _config_of_hub(arch, network=False)
    elif config(arch) is None:
        do = nearest(arch, architectures())
        raise WeightsError(f"model {arch!r}", "no such open_clip architecture", do=do)
    elif tag:
        preprocess = _pretrained(arch, tag)
        quick_gelu = quick_gelu or bool(preprocess.get("quick_gelu"))
    whole = dict(stated if stated is not None else config(arch) or {})
    tokenize = tokenize or _tokenizer(arch, whole)
    with torch.random.fork_rng(devices=[]), downloads.only_local(), _folder_of(stated) as folder:
        torch.default_generator.manual_seed(0)
        name = f"{LOCAL}{folder}" if stated is not None else arch
        net = _create(name, None, where=where, quick_gelu=quick_gelu, weights=False)
    return _wrap(net, arch, whole, preprocess, tokenize)


def load(name: str, *, network: bool = True) -> Clip:
    """`ARCH:TAG` (weights by tag; `ARCH:random` for fixed random ones), `hf-hub:ORG/NAME`, `local-dir:PATH`.

    The tag decides the activation: weights that were trained with QuickGELU always run with it. The tokenizer
    must be on this machine.

    Args:
        name: the model id.
        network: whether weights that are not on this machine may be downloaded.

    Raises:
        WeightsError: unknown architecture or tag, or the weights cannot be had.
    """
    if name.startswith(LOCAL):
        whole, preprocess = configuration.read(Path(name.removeprefix(LOCAL)))
        tokenize = _tokenizer(name, whole)
        with downloads.only_local():
            net = _create(name, None, where=f"model {name}", quick_gelu=False, weights=True)
        return _wrap(net, name, whole, preprocess, tokenize)
    arch, _, tag = name.partition(":")
    if not name.startswith(HUB):
        if tag in ("", "random"):
            if not tag:
                tags = open_clip.list_pretrained_tags_by_model(arch) or ["random"]
                found = "an architecture without weights"
                raise WeightsError(f"model {name!r}", found, "ARCH:TAG", nearest("", tags))
            return build(arch)
        if config(arch) is None:
            raise WeightsError(f"model {name!r}", "no such architecture", do=nearest(arch, architectures()))
    network = network and downloads.hub_is_reachable()
    with nullcontext() if network else downloads.only_local():
        if name.startswith(HUB):
            whole, preprocess = _config_of_hub(name, network=network)
            tokenize = _tokenizer(name, whole)
            net = _create(name, None, where=f"model {name}", quick_gelu=False, weights=True, network=network)
            return _wrap(net, name, whole, preprocess, tokenize)
        known, whole = _pretrained(arch, tag), config(arch) or {}
        tokenize = _tokenizer(name, whole)
        quick = bool(known.get("quick_gelu", False) or whole.get("quick_gelu", False))
        if not network and not known.get("hf_hub") and not downloads.file_of_url(known["url"]).is_file():
            raise _not_here(name)
        net = _create(arch, tag, where=f"model {name}", quick_gelu=quick, weights=True, network=network)
        return _wrap(net, arch, whole, known, tokenize)


def _pretrained(arch: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of the weights `tag`: activation, preprocessing and address."""
    known: dict[str, Any] = open_clip.get_pretrained_cfg(arch, tag) or {}
    if not known:
        tags, where = open_clip.list_pretrained_tags_by_model(arch), f"model '{arch}:{tag}'"
        raise WeightsError(where, f"no weights tagged {tag!r} for {arch}", do=nearest(tag, tags))
    return known


def _config_of_hub(name: str, *, network: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    repository = name.removeprefix(HUB)
    try:
        path = huggingface_hub.hf_hub_download(repository, configuration.FILE, local_files_only=not network)
        table = store.read_json(Path(path))
    except InputError as error:
        raise WeightsError(f"model {name}", str(error)) from None
    except Exception as error:  # a name that the hub refuses, no connection, no such repository
        if not network:
            raise _not_here(name) from None
        raise WeightsError(f"model {name}", _reason(error), do=_advice(name)) from error
    found = table.get("model_cfg") if isinstance(table, dict) else None
    if not isinstance(found, dict):
        raise WeightsError(f"model {name}", f"no model_cfg in its {configuration.FILE}")
    return found, table.get("preprocess_cfg") or {}


def _not_here(name: str) -> WeightsError:
    """The error for weights that are not on this machine, where no network may be or can be asked."""
    expected = f"weights that were downloaded, or {LOCAL}DIR, a folder with {configuration.FILE} and weights"
    return WeightsError(f"model {name}", "not on this machine, and no network", expected, _advice(name))


def _advice(name: str) -> str:
    """What to type to have the files of a model id in a folder."""
    source, known = name.removeprefix(HUB), dict[str, Any]()
    if not name.startswith(HUB):
        known = open_clip.get_pretrained_cfg(*name.partition(":")[::2]) or {}
        source = str(known.get("hf_hub", "")).rpartition("/")[0]
    if not source:
        return f"download {known.get('url', 'them')}"
    return f"where there is a network, type: hf download {source} --local-dir DIR"


def _not_loaded(where: str, error: Exception) -> WeightsError:
    """The error for a network that open_clip cannot make: its reason, but no advice to run a pickle."""
    first, *more = [*str(error).strip().splitlines(), ""]
    if first.startswith("Error(s) in loading state_dict"):  # the names stand in the lines below
        keys = "; ".join(f"{line.strip():.{KEYS}}" for line in more[:2] if line.strip())
        expected = "weights and a configuration of one model"
        return WeightsError(where, f"its weights do not fit its configuration: {keys}", expected)
    if first.startswith("Weights only load failed"):
        found = "its weights are a pickle of more than tensors, which is not run"
        return WeightsError(where, found, "tensors alone", f"make it one: {model_ids.CONVERT}")
    return WeightsError(where, _reason(error), do="see `vlmrob doctor`")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _folder_of(stated: Mapping[str, Any] | None) -> Iterator[str]:
    """A temporary folder with a configuration, in the layout that open_clip builds models from."""
    if stated is None:
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder:
        store.write_json(Path(folder) / configuration.FILE, {"model_cfg": dict(stated)})
        yield folder


def _create(
    name: str, tag: str | None, *, where: str, quick_gelu: bool, weights: bool, network: bool = True
) -> nn.Module:
    muted = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # open_clip warns of random weights and failures on the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the activation is decided above
            net: nn.Module = open_clip.create_model(
                name,
                pretrained=tag,
                precision="fp32",
                force_quick_gelu=quick_gelu,
                load_weights=weights,
                pretrained_text=False,
                require_pretrained=weights,
                weights_only=True,
            )
    except Exception as error:  # open_clip loads many formats; their errors have no base class in common
        if not network:
            raise _not_here(where.removeprefix("model ")) from error
        raise _not_loaded(where, error) from error
    finally:
        logging.disable(muted)
    return net.eval()


_TOKENIZERS: dict[str, Any] = {}


def _tokenizer(name: str, whole: Mapping[str, Any]) -> Any:  # noqa: ANN401 - open_clip's, of several classes
    """The tokenizer of a model; parsing the merges of CLIP takes longer than building a small model."""
    text, folder = whole["text_cfg"], Path(name.removeprefix(LOCAL))
    folders = (folder,) if name.startswith(LOCAL) else ()
    if text.get("hf_tokenizer_name"):
        return configuration.tokenizer(text, folders, f"model {name}")
    key = store.fingerprint([text.get("context_length"), text.get("tokenizer_kwargs")])
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = configuration.tokenizer(text, folders, f"model {name}")
    return _TOKENIZERS[key]


def _wrap(
    net: nn.Module, arch: str, whole: Mapping[str, Any], stated: Mapping[str, Any], tokenize: Tokenize
) -> Clip:
    """The model of an open_clip network.

    Raises:
        WeightsError: an input that is not square, preprocessing that cannot be followed, weights that are not
            finite, or towers that give no embeddings.
    """
    visual: Any = net.visual
    where = f"model {arch}"
    size = visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise WeightsError(where, f"an input of {height} x {width} pixels", "a square input")
    if getattr(visual, "output_tokens", False):  # CoCa: for its decoder, which classifies nothing
        visual.output_tokens = False
    patches.by_matrix(visual)
    merged = {**visual.preprocess_cfg, **{k: v for k, v in stated.items() if v is not None}}
    scale, bias = net.logit_scale, getattr(net, "logit_bias", None)
    quick_gelu = any(isinstance(part, QuickGELU) for part in net.modules())
    language = Language(net).requires_grad_(False)
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()} | net.state_dict()
    numbers: dict[str, Any] = (
        {"logit_scale": scale} if bias is None else {"logit_scale": scale, "logit_bias": bias}
    )
    loaded_towers.require_finite({**state, **numbers}, where)
    inputs = torch.zeros(1, 3, height, width), tokenize(["a"])
    loaded_towers.require_embeddings(visual, language, inputs, whole["embed_dim"], where)
    facts = ModelFacts(
        arch,
        quick_gelu,
        configuration.image_facts(whole, visual),
        configuration.text_facts(whole, language, configuration.tokenizer_identity(tokenize)),
        {} if config(arch) == whole else whole,
    )
    return Clip(
        visual=visual,
        language=language,
        tokenize=tokenize,
        preprocess=of_open_clip(merged, int(height), where),
        logit_scale=loaded_towers.scale_of(scale, where),  # type: ignore[arg-type]
        facts=facts,
        logit_bias=0.0 if bias is None else float(bias.detach()),
    )
