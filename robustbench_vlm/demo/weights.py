"""Make the packaged weights: `make tiny-weights` runs this file.

The student-sized CLIP is pretrained with its text tower, then the image tower of the teachers against that
frozen text tower. The clean and the robust teacher are trained from it by ordinary recipes. Bits are equal on
one machine with one torch version and thread count; elsewhere accuracies agree within a few points.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from robustbench_vlm import console, one_writer, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data.tiny import write
from robustbench_vlm.demo.pretrain import Pretrained, Pretraining, pretrain
from robustbench_vlm.models import checkpoint, checkpoint_card, model_ids, openclip
from robustbench_vlm.training import loop
from robustbench_vlm.training.run import reporting

WORK = Path("runs/tiny-weights")  # the recipes of the teachers name a folder below it as their student
STUDENT = Pretraining(config="vlmrob-tiny", steps=2000, lr=2e-3)
TEACHER = Pretraining(config="vlmrob-tiny-teacher", steps=1400, lr=1.5e-3)
START = "tiny-teacher-start"  # the pretrained teacher, before its recipe; not packaged
TEACHERS = ("tiny-clean-teacher", "tiny-robust-teacher")


def make(data_root: Path, device: torch.device) -> None:
    """Make every packaged checkpoint; finished ones below `runs/tiny-weights` are not made again.

    Args:
        data_root: folder that the tiny world is rendered into.
        device: where the teachers are trained; pretraining runs on the CPU.

    Raises:
        InputError: another process makes them.
    """
    with one_writer.locked(WORK, "folder"), console.meter() as meter:
        if not (WORK / "tiny" / "card.json").exists():
            made = pretrain(
                STUDENT, progress=lambda done, total, _: meter("pretrain the tiny CLIP", done, total)
            )
            _save(WORK / "tiny", "tiny", made, STUDENT, text_from="")
        publish("tiny")
        if not (WORK / START / "card.json").exists():
            text = _text_of(WORK / "tiny")
            made = pretrain(TEACHER, text, lambda done, total, _: meter("pretrain the teacher", done, total))
            _save(WORK / START, START, made, TEACHER, text_from="tiny")
        write.make_missing(data_root, meter, ["tiny-seen"])
        for name in TEACHERS:
            recipe = reader.read("recipes", name, Recipe)
            report = reporting(recipe, meter, console.remark)
            loop.run(recipe, WORK / name, data_root, device, report)
            publish(name)


def publish(name: str) -> None:
    """Copy the weights and the card of a finished folder into the package, byte for byte."""
    for path in [*sorted((WORK / name).glob("*.safetensors")), WORK / name / "card.json"]:
        store.write(model_ids.PACKAGED / name / path.name, path.read_bytes())


def _save(folder: Path, name: str, made: Pretrained, settings: Pretraining, text_from: str) -> None:
    """Write the result of pretraining as a checkpoint folder."""
    model = openclip.build(settings.config)
    checkpoint.fill(model.visual, made.image, name)
    ids = frozenset(int(i) for i in made.token_ids)
    state = {f"net.{key}": value for key, value in made.text.items() if key != "logit_scale"}
    state[checkpoint.TOKENS] = checkpoint.spread_rows(
        state[checkpoint.TOKENS], made.token_ids, model.language
    )
    checkpoint.fill(model.language, state, name)
    scale = float(made.text["logit_scale"].exp())
    model = model.replaced(logit_scale=scale)
    training = {"pretrain": {field: getattr(settings, field) for field in settings.__dataclass_fields__}}
    card = checkpoint.describe(
        model, name, defense="none", trained_on=(), text_from=text_from, training=training
    )
    checkpoint.save_folder(folder, model, card, trained_tokens=None if text_from else ids)


def _text_of(folder: Path) -> dict[str, torch.Tensor]:
    """The text tower of a folder in the form that `pretrain` takes: stored token rows and the logit scale."""
    state = checkpoint.read_state(folder / "text.safetensors")
    text = {name.removeprefix("net."): value for name, value in state.items() if name != "token_ids"}
    text["logit_scale"] = torch.tensor(checkpoint_card.read_card(folder).logit_scale).log()
    return text


def main() -> None:
    """Make the weights here, with the data below `data/`."""
    started = time.perf_counter()
    make(Path("data"), torch.device("cpu"))
    console.remark(f"packaged weights made again in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
