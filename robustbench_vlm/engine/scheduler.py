"""The native engine: continuous batching of images over the rows of a call, and a verdict on each image.

The canonical pass, which decides, has calls of exactly `Job.rows` rows. Attacks call the model in shapes of
their own (`batch_shapes`). In both, rows without work are copies of others. So the numbers of a row do not
depend on how many rows have work, and neither do verdicts, adversarial images or margins.

The trajectories of an image (stage by stage, target by target, restart by restart) run one after another in
one row. When an image is broken or done, the next image takes the row. When no image is left, free rows run
later trajectories of images under attack, or join the lookahead group of a row, or calls shrink to a shape
that was seen to give the same bits. The image with which a trajectory ends is verified in the canonical pass:
fp32, without gradient, in the fixed shape.
"""

from __future__ import annotations

from collections.abc import Iterable

from robustbench_vlm.engine import trajectories
from robustbench_vlm.engine.batch_shapes import Known, Shapes
from robustbench_vlm.engine.image_queue import ImageQueue
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, OnFinding
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_table import RowTable
from robustbench_vlm.engine.verifier import Verifier


def run(model: Model, job: Job, blocks: Iterable[ImageBlock], on_finding: OnFinding) -> Cost:
    """Attack every image, and report one finding for each stage that it enters.

    A finding depends on the model, the image, its label and key, the attack, threat, stage name, seed and
    `Job.rows`; not on the other images or their order, nor on `Job.batch_size` where the model gives the same
    bits in all shapes. So a run is resumed by leaving out the images that have their findings.

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
    oracle = Oracle(model.attacked, once=not model.plain, fixed=model.fixed)
    queue = ImageQueue(model, job, blocks, on_finding)
    if not queue.open() or queue.first is None:
        return Cost(canonical=queue.clean_calls)
    forwards, gradients = attack.passes
    calls = forwards > gradients, gradients > 0  # a gradient has a forward pass of its own
    known, first = model.known.setdefault(calls, Known()), queue.first
    shapes = Shapes(oracle, first.images, first.labels, *calls, job.batch_size, known)
    table, verifier = RowTable(attack, queue, shapes), Verifier(model, queue)
    on_cpu = queue.device.type == "cpu"
    changed = True
    while queue.open():
        if changed or table.full:
            table.fill()
        if table.busy:
            table.step(oracle)
        ended = table.take_ended()
        verifier.add(ended)
        changed = bool(ended)
        while verifier.due(table.busy.values(), smaller_shapes=on_cpu):
            verifier.verify()
            table.drop_obsolete()
            changed = True
    made = oracle.calls
    return Cost(
        made.forwards,
        made.gradients,
        queue.clean_calls + verifier.calls,
        verifier.unconfirmed,
        made.largest,
    )
