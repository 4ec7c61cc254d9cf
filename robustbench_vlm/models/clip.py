"""The encoder (pixels or sentences -> embeddings) and the zero-shot classifier made from it.

Resize and normalisation happen inside the encoder and nowhere else, so a ball around its input is a ball in
pixel space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name
from torch.nn.modules.batchnorm import _BatchNorm

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import identity
from robustbench_vlm.models.identity import state_sha256
from robustbench_vlm.models.preprocess import Preprocess
from robustbench_vlm.models.text_bank import TEXT_ROWS, render, require_sentences, text_bank
from robustbench_vlm.types import TEMPLATES, Wrapped


@dataclass(frozen=True)
class PromptSizes:
    """How many learned prompt tokens each tower has (`models.prompts`).

    Attributes:
        image: tokens a layer of the image tower; 0 for none.
        text: tokens a layer of the text tower; 0 for none.
        depth: layers with tokens of their own.
    """

    image: int
    text: int
    depth: int


@dataclass(frozen=True)
class ModelFacts:
    """What cannot be read off the weights, and is needed to build the model again.

    Attributes:
        arch: name of the open_clip architecture.
        quick_gelu: whether the towers use QuickGELU, as the OpenAI weights do.
        image: what decides the function of the image tower beside its weights (`models.identity`).
        text: the same of the text tower, with the identity of its tokenizer.
        config: the configuration as open_clip reads it; empty for an architecture that open_clip has by name.
        trained_tokens: ids of the tokens that the text tower met in training; `None` if unknown.
        prompts: the learned prompts inside the towers; `None` for none.
    """

    arch: str
    quick_gelu: bool
    image: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    trained_tokens: frozenset[int] | None = None
    prompts: PromptSizes | None = None


class Clip(nn.Module):
    """An image tower with its preprocessing, and the frozen text tower it was trained against.

    A `Clip` is built once. `replaced` makes another one; nothing is assigned to its attributes later.

    Attributes:
        visual: the image tower; the only part that training changes, apart from learned prompts.
        language: token ids (N, L) int64 -> (N, D) text embeddings.
        tokenize: N sentences -> token ids (N, L) int64.
        preprocess: what happens to pixels before the tower.
        logit_scale: s of the cosine logits, a plain number that is never trained here.
        logit_bias: b of the logits s * cos + b, never trained here; 0 for all but sigmoid models (SigLIP).
        facts: architecture, configuration, activation, trained tokens and prompts.
    """

    def __init__(
        self,
        visual: nn.Module,
        language: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        logit_scale: float,
        facts: ModelFacts,
        logit_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.visual = visual
        self.language = language
        self.tokenize = tokenize
        self.preprocess = preprocess
        self.image_size = preprocess.image_size
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.facts = facts
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def replaced(self, **changes: Any) -> Clip:  # noqa: ANN401 - the constructor's own types
        """A `Clip` with other constructor arguments; what is not named is shared, not copied.

        Args:
            **changes: any of `visual`, `language`, `tokenize`, `preprocess`, `logit_scale`, `logit_bias`,
                `facts`.
        """
        names = ("visual", "language", "tokenize", "preprocess", "logit_scale", "logit_bias", "facts")
        made = Clip(**{name: getattr(self, name) for name in names} | changes).to(self.device)
        made.training = self.training  # the towers have their own mode
        return made

    def classifier(self, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Classifier:
        """The zero-shot classifier (pixels -> logits) that `robustbench_vlm.attack` takes.

        Args:
            class_names: C names; class i of the labels is `class_names[i]`.
            templates: sentences with `{c}` where the class name goes; their embeddings are averaged.

        Raises:
            InputError: no class names, or a template without `{c}`.

        Example:
            >>> import robustbench_vlm
            >>> encoder = robustbench_vlm.load_model("tiny")
            >>> classifier = encoder.classifier(["red circle", "blue square"])
            >>> classifier(torch.rand(4, 3, 32, 32)).shape
            torch.Size([4, 2])
        """
        require_sentences(class_names, templates)
        return Classifier(self, text_bank(self, render(class_names, templates)))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.mean.device

    @property
    def rows_apart(self) -> bool:
        """Whether each row of a call is computed alone: false while batch norms are in train mode."""
        return not any(isinstance(m, _BatchNorm) and m.training for m in self.visual.modules())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, D) embeddings as the tower gives them, not unit length."""
        embeddings: Tensor = self.visual(self._prepared(images))
        return embeddings

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, 1 + N, D): the embedding, then the N patches in row order.

        The patches go through the last norm and the projection that the class token goes through, so row 0
        is what `forward` gives.

        Raises:
            WeightsError: a tower that is no transformer with a class token.
        """
        visual: Any = self.visual
        if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool or visual.final_ln_after_pool:
            found = f"{self.facts.arch} has no class token beside its patches"
            raise WeightsError("patch tokens", found, "a vision transformer such as ViT-B-32")
        seen: list[Tensor] = []
        handle = visual.transformer.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            visual(self._prepared(images))
        finally:
            handle.remove()
        patches = seen[0][:, : len(visual.positional_embedding)]  # learned prompts stand behind them
        rows: Tensor = visual.ln_post(patches)
        projected: Tensor = rows @ visual.proj
        return projected

    def _prepared(self, images: Tensor) -> Tensor:
        """The input of the tower: resized and normalised."""
        images = self.preprocess.resized(images)
        return (images - self.mean) / self.std

    @torch.no_grad()
    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length."""
        rows = []
        for start in range(0, len(sentences), TEXT_ROWS):
            chunk = list(sentences[start : start + TEXT_ROWS])
            padded = chunk + [""] * (TEXT_ROWS - len(chunk))
            tokens = self.tokenize(padded).to(self.device)
            rows.append(self.language(tokens).float()[: len(chunk)])
        return F.normalize(torch.cat(rows), dim=-1)

    def untrained_words(self, sentences: Sequence[str]) -> list[str]:
        """Sentences with a token that the text tower never met in training; none where that is unknown."""
        trained = self.facts.trained_tokens
        if trained is None:
            return []
        tokens = self.tokenize(list(sentences)).tolist()
        return [s for s, row in zip(sentences, tokens, strict=True) if not trained.issuperset(row)]

    def logits(self, embeddings: Tensor, bank: Tensor) -> Tensor:
        """Embeddings (B, D) of any length and unit rows (C, D) -> logits s * cos + b, (B, C) float32."""
        unit = F.normalize(embeddings.float(), dim=-1)
        logits: Tensor = self.logit_scale * unit @ bank.T
        return logits + self.logit_bias if self.logit_bias else logits

    def text_fingerprint(self) -> str:
        """Hash of everything that decides a text embedding: weights, configuration, tokenizer, prompts."""
        return identity.of_text(state_sha256(self.language), self.facts.text, self._prompts())

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the weights of each tower, and the fingerprint of the whole model."""
        image, text = state_sha256(self.visual), state_sha256(self.language)
        whole = {
            "image": {"weights": image, **self.facts.image},
            "text": identity.of_text(text, self.facts.text, self._prompts()),
            "preprocess": asdict(self.preprocess),
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
            "prompts": self._prompts(),
        }
        return {"image": image, "text": text, "model": identity.of_model(whole)}

    def _prompts(self) -> dict[str, int]:
        return asdict(self.facts.prompts) if self.facts.prompts else {}


class Classifier(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> logits s * cos(image, class) + b of shape (B, C) float32.

    The encoder is put into eval mode and frozen. With `bf16` its image tower runs under autocast; the cosines
    stay in fp32, since logits of about 25 lie 0.125 apart in bf16, which is more than many margins.

    Attributes:
        model: the encoder.
        bank: (C, D) unit text embeddings, one row a class.
        bf16: whether the image tower runs in bf16.
    """

    def __init__(self, model: Clip, bank: Tensor, *, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("bank", bank)
        self.bank: Tensor
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1] -> cosine logits (B, C) float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            embeddings = self.model(images)
        return self.model.logits(embeddings, self.bank)


class InBf16(Wrapped):
    """An encoder whose image tower runs under bf16 autocast; embeddings come back in fp32."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32."""
        with torch.autocast(images.device.type, torch.bfloat16):
            embeddings = self.encoder(images)
        return embeddings.float()

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1 + N, D) float32."""
        with torch.autocast(images.device.type, torch.bfloat16):
            rows = self.encoder.tokens(images)
        return rows.float()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode without parameter gradients for the time of a `with` block.

    The mode of every submodule and `requires_grad` of every parameter are restored afterwards. The inner
    maximisation needs image gradients only: without this, every attack step would compute weight gradients
    too, and gradients left in `.grad` would corrupt the update.
    """
    modes = [(part, part.training) for part in module.modules()]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
