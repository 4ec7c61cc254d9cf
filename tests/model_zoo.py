"""A zoo of small classifiers, honest and broken, on images of 3 x 8 x 8, each with its true robust count.

An honest model is a deterministic function of each image alone whose gradient is that of what it computes. A
broken one is not: its gradient is wrong, missing or useless, its output is random, or it depends on the batch
or on what was asked before. Every broken model is made from an honest `inner` function that computes the same
or nearly the same; adversarial images of the inner function, found here by a plain attack that shares no code
with the package, are given to the broken model, and so its true count is found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, CLASSES, N = 8, 5, 40
EPS = 10 / 255

Classify = Callable[[Tensor], Tensor]


def pictures(n: int, seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Noisy images of class-wise patterns with 8-bit pixels, and their labels."""
    make = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 3, SIDE, SIDE, generator=make)
    images = 0.5 + 0.35 * (patterns[labels] - 0.5) + 0.15 * noise
    return rounded(images.clamp(0, 1)), labels


def rounded(x: Tensor) -> Tensor:
    """The nearest 8-bit pixels."""
    return (x * 255).round() / 255


# --- networks -----------------------------------------------------------------------------------------------


def trained(
    make: Callable[[], nn.Module], *, classes: int = CLASSES, eps: float = 0.0, seed: int = 0
) -> nn.Module:
    """The network after 60 steps of Adam, on images moved by one sign step of `eps`; frozen, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = make().train()
        optim = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(60):
            images, labels = pictures(64, seed=1000 + step, classes=classes)
            if eps:
                leaf = images.clone().requires_grad_()
                loss = functional.cross_entropy(model(leaf), labels)
                (gradient,) = torch.autograd.grad(loss, leaf)
                images = (images + eps * gradient.sign()).clamp(0, 1)
            loss = functional.cross_entropy(model(images), labels)
            optim.zero_grad()
            loss.backward()
            optim.step()
    optim.zero_grad()
    return model.eval().requires_grad_(False)


def convolutions(
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] = lambda _: nn.Identity(),
    pool: nn.Module | None = None,
    last: nn.Module | None = None,
    classes: int = CLASSES,
) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1 if pool else 2, 1), norm(8), activation(), pool or nn.Identity(),
        nn.Conv2d(8, 16, 3, 2, 1), norm(16), activation(), nn.Flatten(),
        last or nn.Identity(), nn.Linear(64, classes),
    )  # fmt: skip


class Transformer(nn.Module):
    """Patches of 2 pixels, one block with softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.where = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2) + self.where).flatten(1))


class Cosine(nn.Module):
    """Unit features against unit class vectors, times 20, as CLIP does it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(256, 32))
        self.classes = nn.Parameter(torch.randn(CLASSES, 32))

    def forward(self, x: Tensor) -> Tensor:
        features = functional.normalize(self.features(x), dim=1)
        return 20 * features @ functional.normalize(self.classes, dim=1).T


class Residual(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).flatten(1))


class Winners(nn.Module):
    """k-WTA: the largest tenth of all activations of an image stays, the others become zero."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(flat.shape[1] // 10, 1), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: trained(convolutions),
    "second": lambda: trained(convolutions, seed=1),
    "third": lambda: trained(convolutions, seed=2),
    "adversarial": lambda: trained(convolutions, eps=EPS),
    "batch norm": lambda: trained(lambda: convolutions(norm=nn.BatchNorm2d)),
    "dropout": lambda: trained(lambda: convolutions(last=nn.Dropout(0.3))),
    "layer norm": lambda: trained(lambda: convolutions(norm=lambda c: nn.GroupNorm(1, c))),
    "group norm": lambda: trained(lambda: convolutions(norm=lambda c: nn.GroupNorm(4, c))),
    "two classes": lambda: trained(lambda: convolutions(classes=2), classes=2),
    "max pooling": lambda: trained(lambda: convolutions(pool=nn.MaxPool2d(2))),
    "average pooling": lambda: trained(lambda: convolutions(pool=nn.AvgPool2d(2))),
    "relu6": lambda: trained(lambda: convolutions(nn.ReLU6)),
    "sigmoid": lambda: trained(lambda: convolutions(nn.Sigmoid), seed=3),
    "tanh": lambda: trained(lambda: convolutions(nn.Tanh)),
    "gelu": lambda: trained(lambda: convolutions(nn.GELU)),
    "k-wta": lambda: trained(lambda: convolutions(Winners)),
    "transformer": lambda: trained(Transformer),
    "cosine": lambda: trained(Cosine),
    "residual": lambda: trained(Residual),
    "linear": lambda: trained(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))),
    "perceptron": lambda: trained(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    ),
}


@cache
def net(name: str = "plain") -> nn.Module:
    """A trained network of `MAKERS`."""
    return MAKERS[name]()


def plain(x: Tensor) -> Tensor:
    """The network that most models are made of."""
    return net()(x)


# --- an attack of our own, by which true counts are found ---------------------------------------------------


@cache
@torch.enable_grad()
def candidates(inner: Classify, eps: float, classes: int) -> Tensor:
    """(T, N, 3, H, W) images in the Linf ball: momentum PGD on z_t - z_y for each t other than y, twice."""
    images, labels = pictures(N, 1, classes)
    shifts = torch.arange(1, classes).repeat_interleave(2)
    total = len(shifts)
    clean, right = images.repeat(total, 1, 1, 1), labels.repeat(total)
    targets = (right + shifts.repeat_interleave(N)) % classes
    random = eps * (2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(9)) - 1)
    started = (torch.arange(total) % 2).repeat_interleave(N)[:, None, None, None]
    delta, moved, step = started * random, torch.zeros_like(clean), eps / 2
    for number in range(30):
        leaf = (clean + delta).clamp(0, 1).requires_grad_()
        logits = inner(leaf).double()
        gain = logits.gather(1, targets[:, None]) - logits.gather(1, right[:, None])
        (gradient,) = torch.autograd.grad(gain.sum(), leaf)
        length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
        moved = 0.75 * moved + gradient / (length + 1e-30)
        step = step / 2 if number in (10, 18, 24) else step
        delta = (delta + step * moved.sign()).clamp(-eps, eps)
    return (clean + delta).clamp(0, 1).view(total, *images.shape)


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        make: builds the model that is attacked; called anew for every use, since some have a memory.
        inner: the honest function whose adversarial images are given to it; itself, where it is honest.
        judge: builds what decides whether such an image fools it; the inner function where it is random.
        classes: of its logits.
        eps: Linf radius at which about half of the images are robust.
    """

    make: Callable[[], Classify]
    inner: Classify
    judge: Callable[[], Classify]
    classes: int = CLASSES
    eps: float = EPS

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return pictures(N, 1, self.classes)

    @torch.no_grad()
    def truth(self) -> int:
        """How many images are right when clean and stay right under all adversarial images of `inner`."""
        images, labels = self.data
        right = self.judge()(images.clone()).argmax(1) == labels
        for batch in candidates(self.inner, self.eps, self.classes):
            right &= self.judge()(batch.clone()).argmax(1) == labels
        return int(right.sum())


def honest(f: Classify, *, classes: int = CLASSES, eps: float = EPS, inner: Classify | None = None) -> Case:
    return Case(lambda: f, inner or f, lambda: f, classes, eps)


def broken(
    make: Callable[[], Classify], *, inner: Classify = plain, judge: Classify | None = None, eps: float = EPS
) -> Case:
    return Case(make, inner, make if judge is None else lambda: judge, CLASSES, eps)


# --- honest models ------------------------------------------------------------------------------------------


def ensemble(x: Tensor) -> Tensor:
    """The logarithm of the mean of two models' probabilities."""
    return torch.stack([net(name)(x).softmax(1) for name in ("plain", "second")]).mean(0).log()


def low_precision(dtype: torch.dtype) -> Classify:
    """The plain network with weights and activations in `dtype`."""

    @cache
    def cast() -> nn.Module:
        model = convolutions()
        model.load_state_dict(net().state_dict())
        return model.to(dtype).eval().requires_grad_(False)

    return lambda x: cast()(x.to(dtype)).float()


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(x)


def in_place(x: Tensor) -> Tensor:
    return plain(x.sub_(0.5).add_(0.5))


def fixed_noise(x: Tensor) -> Tensor:
    """Noise that is the same in every call, a number for each pixel position."""
    noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return plain(x + 0.03 * noise)


def resized(x: Tensor) -> Tensor:
    large = functional.interpolate(x, size=20, mode="bilinear", align_corners=False)
    return plain(functional.interpolate(large, size=SIDE, mode="bicubic", antialias=True))


def cropped(x: Tensor) -> Tensor:
    return plain(functional.interpolate(x[:, :, 1:-1, 1:-1], size=SIDE, mode="bilinear"))


@cache
def in_double() -> nn.Module:
    model = convolutions()
    model.load_state_dict(net().state_dict())
    return model.double().eval().requires_grad_(False)


RADII = {
    **{"max pooling": 8, "average pooling": 7, "sigmoid": 9, "tanh": 12, "cosine": 13, "transformer": 12},
    **{"linear": 18, "perceptron": 18, "adversarial": 13},
}
"""Radii, times 255, of networks of which another one than `EPS` breaks about half."""

HONEST: dict[str, Case] = {
    name: honest(lambda x, name=name: net(name)(x), eps=RADII.get(name, 10) / 255)
    for name in (
        *("plain", "adversarial", "batch norm", "dropout", "layer norm", "group norm", "max pooling"),
        *("average pooling", "relu6", "sigmoid", "tanh", "gelu", "transformer", "cosine", "residual"),
        *("linear", "perceptron"),
    )
} | {
    "two classes": honest(lambda x: net("two classes")(x), classes=2, eps=18 / 255),
    "logits x 100": honest(lambda x: 100 * plain(x), inner=plain),
    "logits x 0.01": honest(lambda x: plain(x) / 100, inner=plain),
    "logits + 10000": honest(lambda x: plain(x) + 1e4, inner=plain),
    "logits - 300": honest(lambda x: plain(x) - 300, inner=plain),
    "log-softmax": honest(lambda x: plain(x).log_softmax(1), inner=plain),
    "log of mean probabilities": honest(ensemble),
    "resizing": honest(resized, eps=7 / 255),
    "clamping": honest(lambda x: plain(x.clamp(0, 1)), inner=plain),
    "double": honest(lambda x: in_double()(x.double()).float(), inner=plain),
    "half": honest(low_precision(torch.float16), inner=plain),
    "bf16": honest(low_precision(torch.bfloat16), inner=plain),
    "bf16 autocast inside": honest(autocast, inner=plain),
    "half logits": honest(lambda x: plain(x).half(), inner=plain),
    "double logits": honest(lambda x: plain(x).double(), inner=plain),
    "in place": honest(in_place, inner=plain),
    "noise per pixel position": honest(fixed_noise),
    "centre crop": honest(cropped, eps=5 / 255),
    "padding": honest(lambda x: plain(functional.pad(x, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1])),
    "tensor mean removed": honest(lambda x: plain(x - x.mean((1, 2, 3), keepdim=True) + 0.5)),
}


# --- gradients that are not those of the function -----------------------------------------------------------


class _Backward(torch.autograd.Function):
    """The identity with another backward pass."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change, ctx.x = change, x.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient, ctx.x), None


def backward(change: Callable[[Tensor, Tensor], Tensor], f: Classify = plain) -> Classify:
    """`f` whose image gradient is `change(gradient, images)`."""
    return lambda x: f(_Backward.apply(x, change))


def straight_through(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`f` with the gradient of the identity."""
    return lambda x: x + (f(x) - x).detach()


def noise(gradient: Tensor, x: Tensor) -> Tensor:
    """Random numbers of the gradient's size, other ones in every call."""
    drawn = torch.randn(gradient.shape)
    return drawn * gradient.flatten(1).norm(dim=1)[:, None, None, None] / SIDE / 3**0.5


def fixed(gradient: Tensor, x: Tensor) -> Tensor:
    """The same random numbers in every call, of the gradient's size."""
    drawn = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return drawn * gradient.flatten(1).norm(dim=1)[:, None, None, None] / SIDE / 3**0.5


def clipped(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


def without_largest(gradient: Tensor, x: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    bound = flat.abs().quantile(0.9, dim=1, keepdim=True)
    return (flat * (flat.abs() < bound)).view_as(gradient)


def on_a_third(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Only the gradients of images of which the first pixels happen to say so."""

    def third(gradient: Tensor, x: Tensor) -> Tensor:
        chosen = _third(x)[:, None, None, None]
        return torch.where(chosen, change(gradient, x), gradient)

    return third


def _third(x: Tensor) -> Tensor:
    """(B,) bool, about a third of the images and their neighbourhoods."""
    return x[:, 0, :4, :4].mean((1, 2)) > 0.52


def grid_gap(x: Tensor) -> Tensor:
    """(B, 3, H, W) bool, pixels that are not of 8 bits."""
    return ((x * 255) - (x * 255).round()).abs() > 1e-3


def detached_off_grid(x: Tensor) -> Tensor:
    """No gradient for an image with any pixel off the 8-bit grid."""
    off = grid_gap(x).flatten(1).any(1)[:, None, None, None]
    return plain(torch.where(off, x.detach(), x))


def detached_pixels_off_grid(x: Tensor) -> Tensor:
    return plain(torch.where(grid_gap(x), x.detach(), x))


def blurred(x: Tensor) -> Tensor:
    return functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def detached_blur(x: Tensor) -> Tensor:
    """Sharpened: the blurred part, which is all that neighbouring pixels have in common, is detached."""
    return plain(0.5 * x + 0.5 * blurred(x).detach())


@cache
def _cosines() -> Tensor:
    place = torch.arange(8.0)
    basis = torch.cos((2 * place[None] + 1) * place[:, None] * torch.pi / 16) / 2
    basis[0] /= 2**0.5
    return basis


def jpeg(x: Tensor) -> Tensor:
    """Coefficients of 8 x 8 blocks rounded to multiples of 0.1."""
    basis = _cosines()
    coefficients = basis @ x @ basis.T
    return basis.T @ ((coefficients / 0.1).round() * 0.1) @ basis


def median(x: Tensor) -> Tensor:
    patches = functional.unfold(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3)
    return patches.view(len(x), 3, 9, -1).median(2).values.view_as(x)


def purified(x: Tensor) -> Tensor:
    """Denoised by three rounds of half a median filter, without gradient."""
    with torch.no_grad():
        for _ in range(3):
            x = 0.7 * x + 0.3 * median(x)
    return x


def purified_straight(x: Tensor) -> Tensor:
    clean = x
    for _ in range(3):
        clean = 0.7 * clean + 0.3 * median(clean)
    return clean


def counter_attacked(x: Tensor) -> Tensor:
    """Before it is classified an image is moved towards the class that it has, all under `enable_grad`."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = plain(leaf)
        top = logits.topk(2, dim=1).values
        (gradient,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), leaf)
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        return plain((leaf + 0.02 * gradient.sign()).clamp(0, 1))


# --- models that do not treat an image alone, or not always alike -------------------------------------------


def random_resize(x: Tensor) -> Tensor:
    side = int(torch.randint(6, 13, ()))
    return plain(functional.interpolate(functional.interpolate(x, size=side), size=SIDE))


def keyed_noise(x: Tensor, size: float = 0.05) -> Tensor:
    """Noise drawn from the bytes of each image."""
    drawn = []
    for image in x.detach():
        digest = hashlib.sha256(np.ascontiguousarray(image.numpy()).tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn.append(torch.randn(image.shape, generator=generator))
    return plain(x + size * torch.stack(drawn))


def random_member(x: Tensor) -> Tensor:
    return net(("plain", "second", "third")[int(torch.randint(3, ()))])(x)


def tiny_noise(x: Tensor) -> Tensor:
    return plain(x) + 1e-3 * torch.randn(len(x), CLASSES)


def call_counter() -> Classify:
    """One of three networks, in turn."""
    calls = iter(range(10**9))
    return lambda x: net(("plain", "second", "third")[next(calls) % 3])(x)


def late_counter() -> Classify:
    """Honest for 22 calls, then the largest logit is raised by 30."""
    calls = iter(range(10**9))

    def model(x: Tensor) -> Tensor:
        logits = plain(x)
        late = next(calls) >= 22
        return logits + late * 30 * functional.one_hot(logits.argmax(1), CLASSES)

    return model


def late_noise(first: int, last: int = 10**9) -> Classify:
    """The gradient is noise from the backward pass number `first` on (from 1), until number `last`."""
    passes = iter(range(1, 10**9))

    def change(gradient: Tensor, x: Tensor) -> Tensor:
        return noise(gradient, x) if first <= next(passes) <= last else gradient

    return backward(change)


def other_under_grad(x: Tensor) -> Tensor:
    return net("third")(x) if torch.is_grad_enabled() else plain(x)


class Remembers:
    """An image near one that it met first gets the logits of that one; gradients are those of the network."""

    def __init__(self) -> None:
        self.met: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.met is None:
            self.met = x.detach().clone()
        apart = (x.detach()[:, None] - self.met[None]).flatten(2).abs().amax(2)
        nearest = apart.min(1)
        logits = plain(x)
        old = plain(self.met)[nearest.indices]
        near = (nearest.values <= EPS * 1.01)[:, None]
        return torch.where(near, logits + (old - logits).detach(), logits)


class Believes:
    """Near an image that it met first, the class of that image gets 20 more, in every call."""

    def __init__(self) -> None:
        self.met: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.met is None:
            self.met = x.detach().clone()
        apart = (x.detach()[:, None] - self.met[None]).flatten(2).abs().amax(2)
        nearest = apart.min(1)
        classes = functional.one_hot(plain(self.met).argmax(1), CLASSES)[nearest.indices]
        return plain(x) + 20 * classes * (nearest.values <= EPS * 1.01)[:, None]


def training(name: str) -> Callable[[], Classify]:
    """A copy of a network in training mode."""

    def make() -> nn.Module:
        model = (
            convolutions(norm=nn.BatchNorm2d) if name == "batch norm" else convolutions(last=nn.Dropout(0.3))
        )
        model.load_state_dict(net(name).state_dict())
        return model.requires_grad_(False).train()

    return make


def training_mode(name: str) -> Case:
    def inner(x: Tensor) -> Tensor:
        return net(name)(x)

    return broken(training(name), inner=inner, judge=inner)


def batch_mean(x: Tensor) -> Tensor:
    logits = plain(x)
    return logits - 0.5 * logits.mean(0)


def nan_on_a_third(x: Tensor) -> Tensor:
    return torch.where(_third(x)[:, None], torch.nan, plain(x))


def one_hot(x: Tensor) -> Tensor:
    return functional.one_hot(plain(x).argmax(1), CLASSES).float()


def soft_one_hot(x: Tensor) -> Tensor:
    """One-hot outputs times 10 with the gradient of the softmax."""
    soft = plain(x).softmax(1)
    return 10 * (soft + (one_hot(x) - soft).detach())


def scaled(change: Callable[[Tensor, Tensor], Tensor], by: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gradient, x: by * change(gradient, x)


def same(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient


def negated(gradient: Tensor, x: Tensor) -> Tensor:
    return -gradient


def mirrored(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.flip(3)


def shifted(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.roll((3, 1, 2), (1, 2, 3))


def nothing(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(gradient)


def not_a_number(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * torch.nan


BROKEN: dict[str, Case] = {
    # the image is changed before it is classified
    "rounding": broken(lambda: lambda x: plain(rounded(x))),
    "rounding, straight through": broken(lambda: lambda x: plain(straight_through(rounded)(x))),
    "rounding to 16 levels, straight through": broken(
        lambda: lambda x: plain(straight_through(lambda v: (v * 15).round() / 15)(x))
    ),
    "rounding to 16 levels": broken(lambda: lambda x: plain((x * 15).round() / 15)),
    "JPEG": broken(lambda: lambda x: plain(jpeg(x))),
    "JPEG, straight through": broken(lambda: lambda x: plain(straight_through(jpeg)(x))),
    "purification": broken(lambda: lambda x: plain(purified(x)), inner=lambda x: plain(purified_straight(x))),
    "purification, straight through": broken(
        lambda: lambda x: plain(straight_through(purified)(x)), inner=lambda x: plain(purified_straight(x))
    ),
    "counter-attack": broken(lambda: counter_attacked),
    # detached
    "detached": broken(lambda: lambda x: plain(x.detach())),
    "under no_grad": broken(lambda: torch.no_grad()(plain)),
    "half detached": broken(lambda: lambda x: plain(0.5 * x + 0.5 * x.detach())),
    "nine tenths detached": broken(lambda: lambda x: plain(0.1 * x + 0.9 * x.detach())),
    "two channels detached": broken(lambda: lambda x: plain(torch.cat([x[:, :1], x[:, 1:].detach()], 1))),
    "half of the columns detached": broken(
        lambda: lambda x: plain(torch.cat([x[..., :4], x[..., 4:].detach()], 3))
    ),
    "blur detached": broken(lambda: detached_blur, inner=lambda x: plain(0.5 * x + 0.5 * blurred(x))),
    "images detached off the grid": broken(lambda: detached_off_grid),
    "pixels detached off the grid": broken(lambda: detached_pixels_off_grid),
    # outputs
    "softmax": broken(lambda: lambda x: plain(x).softmax(1)),
    "softmax of 100 times the logits": broken(lambda: lambda x: (100 * plain(x)).softmax(1)),
    "100 times the softmax": broken(lambda: lambda x: 100 * plain(x).softmax(1)),
    "10 times the softmax of 30 times the logits": broken(lambda: lambda x: 10 * (30 * plain(x)).softmax(1)),
    "log-softmax, clamped": broken(lambda: lambda x: (10 * plain(x)).log_softmax(1).clamp(min=-4)),
    "rounded logits": broken(lambda: lambda x: plain(x).round()),
    "rounded logits, straight through": broken(lambda: lambda x: straight_through(torch.round)(plain(x))),
    "constant": broken(lambda: lambda x: plain(x) * 0 + torch.eye(CLASSES)[0], judge=lambda x: plain(x) * 0),
    "argmax": broken(lambda: one_hot),
    "argmax with the gradient of a softmax": broken(lambda: soft_one_hot),
    "k-WTA": broken(lambda: lambda x: net("k-wta")(x), inner=lambda x: net("k-wta")(x)),
    # randomness, batches, memory
    "batch norm in training mode": training_mode("batch norm"),
    "dropout in training mode": training_mode("dropout"),
    "batch mean removed": broken(lambda: batch_mean, judge=plain),
    "random resizing": broken(lambda: random_resize, judge=plain),
    "tiny noise": broken(lambda: tiny_noise, judge=plain),
    "noise keyed by content": broken(lambda: keyed_noise, judge=plain),
    "little noise keyed by content": broken(lambda: lambda x: keyed_noise(x, 0.01), judge=plain),
    "random member": broken(lambda: random_member, judge=plain),
    "call counter": broken(call_counter, judge=plain),
    "late call counter": broken(late_counter, judge=plain),
    "remembers images": broken(Remembers, judge=plain),
    "believes its first answer": broken(Believes, judge=plain),
    "another network under grad": broken(lambda: other_under_grad),
    # gradients
    "gradient negated": broken(lambda: backward(negated)),
    "gradient mirrored": broken(lambda: backward(mirrored)),
    "gradient shifted": broken(lambda: backward(shifted)),
    "gradient clipped": broken(lambda: backward(clipped)),
    "gradient x 1e-4": broken(lambda: backward(scaled(same, 1e-4))),
    "gradient negated x 1e-4": broken(lambda: backward(scaled(negated, 1e-4))),
    "gradient mirrored x 1e-4": broken(lambda: backward(scaled(mirrored, 1e-4))),
    "gradient x 1e-12": broken(lambda: backward(scaled(same, 1e-12))),
    "gradient mirrored x 1e-12": broken(lambda: backward(scaled(mirrored, 1e-12))),
    "gradient is noise": broken(lambda: backward(noise)),
    "gradient is noise x 1e-4": broken(lambda: backward(scaled(noise, 1e-4))),
    "gradient is noise, logits + 10000": broken(lambda: lambda x: backward(noise)(x) + 1e4),
    "gradient is mirrored, logits + 10000": broken(lambda: lambda x: backward(mirrored)(x) + 1e4),
    "gradient is noise, in bf16": broken(lambda: backward(noise, low_precision(torch.bfloat16))),
    "gradient is fixed noise": broken(lambda: backward(fixed)),
    "gradient without its largest tenth": broken(lambda: backward(without_largest)),
    "gradient is noise on a third": broken(lambda: backward(on_a_third(noise))),
    "no gradient on a third": broken(lambda: backward(on_a_third(nothing))),
    "gradient is noise from the third backward on": broken(lambda: late_noise(3)),
    "gradient is noise from the twelfth backward on": broken(lambda: late_noise(12)),
    "gradient is noise during the attack": broken(lambda: late_noise(12, 90)),
    "gradient NaN": broken(lambda: backward(not_a_number)),
    "gradient NaN on a third": broken(lambda: backward(on_a_third(not_a_number))),
    "NaN": broken(lambda: lambda x: plain(x) * torch.nan, judge=lambda x: plain(x) * torch.nan),
    "NaN on a third": broken(lambda: nan_on_a_third),
}
