"""The native engine: continuous batching of images over a fixed number of rows, and a verdict on each image.

Every model call has exactly `Job.rows` rows; rows without work are copies of others. So the numbers of a row
do not depend on how many rows have work, and neither do verdicts, adversarial images or margins.

The trajectories of an image (stage by stage, target by target, restart by restart) run one after another in
one row. When an image is broken or done, the next image takes the row. When no image is left, free rows run
later trajectories of images under attack, or join the lookahead group of a row. On a CPU, where free rows
cost as much as others, calls then shrink to a shape that was seen to give the same bits. The image with which
a trajectory ends is verified in the canonical pass: fp32, without gradient, in the fixed shape.
"""

from __future__ import annotations

from collections.abc import Iterable

from robustbench_vlm.engine import trajectories
from robustbench_vlm.engine.batch_shapes import Shapes
from robustbench_vlm.engine.image_queue import ImageQueue
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, OnFinding
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_table import RowTable
from robustbench_vlm.engine.verifier import Verifier

POLL = {"cpu": 1, "cuda": 8}
"""Iterations between two reads of the rows' flags, which wait for the device."""


def run(model: Model, job: Job, blocks: Iterable[ImageBlock], on_finding: OnFinding) -> Cost:
    """Attack every image, and report one finding for each stage that it enters.

    A finding depends on the model, the image, its label and key, the attack, threat, stage name, seed and
    `Job.rows`; not on the other images, their order, or `Job.active_rows`. So a run is resumed by leaving out
    the images that have their findings.

    Args:
        model: its canonical function decides, whatever attacks see.
        job: stages that share rows (`trajectories.groups`), ball, shape, stopping rule and seed.
        blocks: images; each block is opened when those before it run out.
        on_finding: called once for each image and stage, in the order in which they end. A
            misclassified clean image is reported as broken, without attack, in the stage in which it begins.

    Raises:
        InputError: a norm that an attack does not support, or images that disagree with the job.
        AttackError: an attack left the ball or the box, or the model gives no gradient.
    """
    job.check()
    attack = trajectories.shared_attack(job.stages)
    oracle = Oracle(model.attacked, once=not model.plain)
    queue = ImageQueue(model, job, blocks, on_finding)
    if not queue.open():
        return Cost(canonical=queue.clean_calls)
    shapes = _shapes(model, job, queue, attack, oracle)
    table, verifier = RowTable(attack, queue, shapes), Verifier(model, queue)
    poll = POLL.get(queue.device.type, 1)
    changed = True
    while queue.open():
        if changed:
            table.fill()
        if table.busy:
            table.step(oracle, poll)
            ended = table.take_ended()
            verifier.add(ended)
            changed = bool(ended)
        while verifier.due(len(table.busy), smaller_shapes=shapes is not None and shapes.some):
            verifier.verify()
            table.drop_obsolete()
            changed = True
    calls = oracle.calls
    return Cost(calls.forwards, calls.gradients, queue.clean_calls + verifier.calls, verifier.unconfirmed)


def _shapes(model: Model, job: Job, queue: ImageQueue, attack: Attack, oracle: Oracle) -> Shapes | None:
    """Smaller shapes for the end of a run; None where free rows cost little or the view is another model."""
    first = queue.first
    if first is None or not model.plain or queue.device.type != "cpu":
        return None
    return Shapes(oracle, first.images, first.labels, first.clean, job.rows, attack.passes[1] > 0)
