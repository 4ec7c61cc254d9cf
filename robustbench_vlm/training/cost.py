"""Cost of a training run, computed before it starts: passes, floating-point operations, memory.

Operations per image and step are F_S (n_F + n_Bi + 2 n_Bw) + sum_T F_T n_T. F_S and F_T are those of one
forward of student and teacher T; n_F, n_Bi, n_Bw and n_T count forwards of the student, its backwards to the
images, its backwards to the weights, and forwards of T. A backward to the images alone costs as much as one
forward, and a backward to images and weights as much as two. A backward to adapters or prompts computes no
gradients of the tower's weights and counts as one.

One multiplication with its addition counts as two operations, and norms, activation functions and softmaxes
are left out, as in the profile that open_clip publishes. The text tower runs once and is left out; with
prompts it runs on every class in every step, which is left out too. Where a batch is computed in parts
(`optim.accumulate`), every forward of the loss that has a backward is computed twice, and activations are
those of one part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.defenses.interface import Passes

FLOAT = 4  # bytes of an fp32 number
GIB = 2**30


@dataclass(frozen=True)
class Tower:
    """An image tower in numbers.

    Attributes:
        flops: of one forward of one image.
        parameters: weights of the tower.
        activations: floats per image that a forward stores for its backward.
        widest: floats per image of the widest layer, which a forward without gradient needs.
        text: weights of the text tower beside it.
        width: of a transformer, 0 for a residual network.
        layers: of a transformer.
        mlp_ratio: of a transformer.
    """

    flops: float
    parameters: int
    activations: int
    widest: int
    text: int = 0
    width: int = 0
    layers: int = 0
    mlp_ratio: float = 4.0


SIZES = {"image_size", "width", "layers", "patch_size"}
NO_SIZES = {"head_width", "mlp_ratio", "no_ln_pre", "ls_init_value", "pool_type", "output_tokens"}
NO_SIZES |= {"final_ln_after_pool", "act_kwargs", "norm_kwargs", "patch_dropout"}
TEXT_SIZES = {"width", "layers", "vocab_size", "context_length"}
"""Settings of towers that can be counted here; those in `NO_SIZES` hardly change what a tower costs."""


def tower(config: Mapping[str, Any]) -> Tower | None:
    """The image tower of an open_clip model configuration, a plain ViT or a ModifiedResNet, in numbers.

    Returns:
        None for a model with a tower of another kind, such as one of timm or transformers.
    """
    vision, given = config["vision_cfg"], config["text_cfg"]
    if not SIZES <= vision.keys() <= SIZES | NO_SIZES or not given.keys() >= TEXT_SIZES:
        return None
    if not isinstance(vision["image_size"], int):
        return None
    text = _text(given, config["embed_dim"])
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
    activations = int(layers * (8 + 2 * ratio) * rows * width + 3 * rows * width)
    widest = int(rows * width * max(3, ratio) * 2)
    return Tower(2 * macs, int(parameters), activations, widest, text, width, layers, ratio)


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
    """The number of weights that a recipe trains in the student's image tower, its prompts included."""
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
        student: the student's towers in numbers.
        teachers: those of every teacher, by role.
        images: in the training split; 0 if unknown.

    Returns:
        A table for a reader: counts as whole numbers, `gflop_per_image` and `gib` rounded.
    """
    attack_steps = recipe.inner.steps if recipe.inner else 0
    flops = _flops(recipe, passes, student, teachers)
    memory = _memory(recipe, passes, student, teachers)
    seen = recipe.optim.steps * recipe.optim.batch_size
    return {
        "images_seen": seen,
        "effective_epochs": round(seen / images, 4) if images else None,
        "trained_weights": trained(recipe, student),
        "passes_per_step": {
            "attack": {
                "student_forward_and_image_backward": attack_steps,
                "also_through": list(passes.attacked),
            },
            "student": passes.student,
            "student_without_gradient": _without_gradient(passes, student),
            "teachers": dict(passes.teachers),
        },
        "gflop_per_image": round(flops / 1e9, 4),
        "pflop_in_all": round(flops * seen / 1e15, 4),
        "gib": {name: round(size / GIB, 3) for name, size in memory.items()},
        "assumes": f"fp32, {_parts(recipe)}; kernels, allocator and context need memory on top",
    }


def _parts(recipe: Recipe) -> str:
    parts = recipe.optim.accumulate
    return (
        f"a batch in {parts} parts, computed again for the backward" if parts > 1 else "without checkpointing"
    )


def _without_gradient(passes: Passes, student: Tower) -> int:
    """Student forwards without gradient; of the towers known here, residual networks have batch norms."""
    return passes.student_no_grad + (0 if student.layers else passes.student_batch_norm)


def _flops(recipe: Recipe, passes: Passes, student: Tower, teachers: Mapping[str, Tower]) -> float:
    """Operations of one step per image."""
    attack_steps = recipe.inner.steps if recipe.inner else 0
    backward = 2 if recipe.lora is None and recipe.prompts is None else 1
    without = _without_gradient(passes, student)
    forwards = 2 if recipe.optim.accumulate > 1 else 1  # of what has a backward
    flops = student.flops * (2 * attack_steps + passes.student * (forwards + backward) + without)
    for role, count in passes.teachers.items():
        learns = backward + forwards - 1
        more = 2 * attack_steps * (role in passes.attacked) + learns * (role in passes.learners)
        flops += teachers[role].flops * (count + more)
    return flops


def _memory(recipe: Recipe, passes: Passes, student: Tower, teachers: Mapping[str, Tower]) -> dict[str, int]:
    """Bytes of weights, of gradients and moments, of activations, and in total."""
    moments = 2 if recipe.optim.algorithm == "adamw" else 1
    in_outer = passes.student * student.activations
    in_outer += sum(teachers[role].activations for role in passes.learners)
    in_attack = student.activations + sum(teachers[role].activations for role in passes.attacked)
    with_graph = max(in_outer, in_attack) if recipe.inner else in_outer
    per_image = with_graph + max((teacher.widest for teacher in teachers.values()), default=0)
    memory = {
        "weights": sum(tower.parameters + tower.text for tower in (student, *teachers.values())) * FLOAT,
        "gradients_and_moments": trained(recipe, student) * (1 + moments) * FLOAT,
        "activations": per_image * recipe.optim.batch_size // recipe.optim.accumulate * FLOAT,
    }
    return {**memory, "total": sum(memory.values())}
