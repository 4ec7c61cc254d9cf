"""What a training run costs before it is started, by arithmetic: passes, floating-point operations, memory.

Counts are per image and step, after the cost model F_S (n_F + n_Bi + 2 n_Bw) + sum F_T n_T: a backward to
the image alone costs one forward, a backward to image and weights two. Adapters and prompts leave the weights
out, so theirs costs one. One multiplication with its addition counts as two operations, as in the profile
that open_clip publishes; norms, activations and softmaxes are left out, as there. The text tower runs once;
with prompts it runs on every class in every step, which is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.defenses.interface import Passes

FLOAT = 4  # bytes; training runs in fp32
GIB = 2**30


@dataclass(frozen=True)
class Tower:
    """An image tower in numbers.

    Attributes:
        flops: of one forward of one image.
        parameters: weights of the tower.
        kept: floats per image that a forward keeps for its backward.
        working: floats per image of the widest layer, what a forward without graph needs.
        text: weights of the text tower beside it.
        width: of a transformer, 0 for a residual network.
        layers: of a transformer.
        mlp_ratio: of a transformer.
    """

    flops: float
    parameters: int
    kept: int
    working: int
    text: int = 0
    width: int = 0
    layers: int = 0
    mlp_ratio: float = 4.0


def tower(config: Mapping[str, Any]) -> Tower:
    """The towers of an open_clip model configuration: a plain ViT, or a ModifiedResNet."""
    vision = config["vision_cfg"]
    text = _text(config["text_cfg"], config["embed_dim"])
    if isinstance(vision["layers"], int):
        return _transformer(vision, config["embed_dim"], text)
    return _residual(vision, config["embed_dim"], text)


def _text(text: Mapping[str, Any], embed: int) -> int:
    width, ratio = text["width"], text.get("mlp_ratio", 4.0)
    block = int((4 + 2 * ratio) * width**2 + (9 + ratio) * width)
    return int((text["vocab_size"] + text["context_length"] + embed + 2) * width + text["layers"] * block + 1)


def _transformer(vision: Mapping[str, Any], embed: int, text: int) -> Tower:
    width, layers, patch = vision["width"], vision["layers"], vision["patch_size"]
    ratio, patches = vision.get("mlp_ratio", 4.0), (vision["image_size"] // patch) ** 2
    rows = patches + 1  # the class token
    linear = (4 + 2 * ratio) * width**2
    per_layer = rows * linear + 2 * rows**2 * width  # scores and their sum over values
    macs = patches * 3 * patch**2 * width + layers * per_layer + width * embed
    parameters = 3 * patch**2 * width + (1 + rows) * width + 4 * width + width * embed
    parameters += layers * int(linear + (9 + ratio) * width)
    kept = int(layers * (8 + 2 * ratio) * rows * width + 3 * rows * width)
    working = int(rows * width * max(3, ratio) * 2)
    return Tower(2 * macs, int(parameters), kept, working, text, width, layers, ratio)


def _residual(vision: Mapping[str, Any], embed: int, text: int) -> Tower:
    width, side = vision["width"], vision["image_size"]
    convolutions = [(3, width // 2, 3, side // 2), (width // 2, width // 2, 3, side // 2)]
    convolutions += [(width // 2, width, 3, side // 2)]
    inputs, side = width, side // 4
    for index, blocks in enumerate(vision["layers"]):
        planes = width * 2**index
        for block in range(blocks):
            after = side // 2 if index and not block else side  # strides sit in pools after the 3 x 3
            convolutions += [
                (inputs, planes, 1, side),
                (planes, planes, 3, side),
                (planes, 4 * planes, 1, after),
            ]
            if not block:
                convolutions.append((inputs, 4 * planes, 1, after))
            inputs, side = 4 * planes, after
    macs, parameters, outputs, sizes = 0, 0, 0, []
    for before, after, kernel, out in convolutions:
        macs += before * after * kernel**2 * out**2
        parameters += before * after * kernel**2 + 2 * after  # a batch norm follows
        sizes.append(after * out**2)
    outputs = sum(sizes)
    rows = side**2 + 1
    macs += rows * (3 * inputs**2 + inputs * embed) + 2 * rows**2 * inputs  # the attention pool
    parameters += rows * inputs + 3 * (inputs**2 + inputs) + inputs * embed + embed
    widest = max(a + b for a, b in pairwise(sizes))
    return Tower(2 * macs, parameters, 2 * outputs + 6 * rows * inputs, widest, text)


def trained(recipe: Recipe, student: Tower) -> int:
    """How many weights of the student's image tower a recipe trains (prompts of the text tower left out)."""
    if recipe.lora is not None:
        w, wide = student.width, int(student.mlp_ratio * student.width)
        per_rank = {"attn": 6 * w, "c_fc": w + wide, "c_proj": w + wide}  # inputs and outputs of every linear
        return recipe.lora.r * student.layers * sum(per_rank.get(name, 0) for name in recipe.lora.targets)
    if recipe.prompts is not None:
        return recipe.prompts.image * student.width * min(recipe.prompts.depth, student.layers)
    return student.parameters


def estimate(
    recipe: Recipe, passes: Passes, student: Tower, teachers: Mapping[str, Tower], images: int
) -> dict[str, Any]:
    """Epochs, operations and memory of a whole run.

    Args:
        recipe: with its batch size, steps, attack, and what it trains.
        passes: of one step, from the defense.
        student: its towers in numbers.
        teachers: those of every role.
        images: in the training split; 0 if unknown.

    Returns:
        A table for a reader: counts as whole numbers, `gflop_per_image` and `gib` rounded.
    """
    attack, optim = recipe.inner.steps if recipe.inner else 0, recipe.optim
    whole = recipe.lora is None and recipe.prompts is None
    backward = 2 if whole else 1
    flops = student.flops * (2 * attack + passes.student * (1 + backward) + passes.student_no_grad)
    for role, count in passes.teachers.items():
        more = 2 * attack * (role in passes.attacked) + backward * (role in passes.learners)
        flops += teachers[role].flops * (count + more)
    weights = trained(recipe, student)
    moments = 2 if optim.algorithm == "adamw" else 1
    graphs = passes.student * student.kept + sum(teachers[role].kept for role in passes.learners)
    under_attack = student.kept + sum(teachers[role].kept for role in passes.attacked) if attack else 0
    standing = sum(t.parameters + t.text for t in (student, *teachers.values())) * FLOAT
    state = weights * (1 + moments) * FLOAT
    per_image = max(graphs, under_attack) + max((t.working for t in teachers.values()), default=0)
    activations = per_image * optim.batch_size * FLOAT
    memory = {"weights": standing, "gradients_and_moments": state, "activations": activations}
    memory["total"] = sum(memory.values())
    seen = optim.steps * optim.batch_size
    return {
        "images_seen": seen,
        "effective_epochs": round(seen / images, 4) if images else None,
        "trained_weights": weights,
        "passes_per_step": {
            "attack": {"student_forward_and_image_backward": attack, "also_through": list(passes.attacked)},
            "student": passes.student,
            "student_without_gradient": passes.student_no_grad,
            "teachers": dict(passes.teachers),
        },
        "gflop_per_image": round(flops / 1e9, 4),
        "pflop_in_all": round(flops * seen / 1e15, 4),
        "gib": {name: round(size / GIB, 3) for name, size in memory.items()},
        "says": "fp32, without checkpointing; kernels, allocator and context come on top of the memory",
    }
