"""The pool of workers without Ray: workers of this process that die where they are told to."""

import json
import shutil
import threading
import time
import warnings
from contextlib import suppress

import pytest
import toys
from killed_evaluations import outcome

from robustbench_vlm.engine.check_record import check
from robustbench_vlm.engine.job import Cost
from robustbench_vlm.errors import AttackError, Incomplete, InputError, VlmrobError
from robustbench_vlm.evaluation import cells, executor, measure, remote_work
from robustbench_vlm.evaluation import cluster as cluster_module
from robustbench_vlm.evaluation.cluster import About, Lost
from robustbench_vlm.evaluation.dispatch import LOSSES
from robustbench_vlm.evaluation.open_work import LiveWorker
from robustbench_vlm.evaluation.pool import Pool
from robustbench_vlm.evaluation.worker import Attack, Done, Failed, Found, Order, Worker

BUSY = threading.Lock()  # one worker computes at a time: torch has settings of the whole process


class LocalHandle:
    """A worker in this process. `dies(number, answer)` says whether it dies instead of giving an answer."""

    def __init__(self, number, dies):
        self.number, self.dies, self.killed = number, dies, threading.Event()
        self.worker, self.orders = Worker("cpu", 1), []

    def about(self, seconds):
        return About(self.number, "here", "cpu")

    def answers(self, order, references, tick):
        with BUSY:
            self.orders.append(order)
            found = list(
                self.worker.carry_out(
                    order, lambda with_model: (references[0] if with_model else None, references[1])
                )
            )
        for answer in found:
            if self.killed.is_set() or self.dies(self.number, answer):
                self.killed.set()
                raise Lost("died")
            yield answer

    def kill(self):
        self.killed.set()


class LocalCluster:
    """Places for some workers, of which more may be added."""

    def __init__(self, places, dies=lambda number, answer: False, joining=False):
        self.number, self.dies, self.joining = places, dies, joining
        self.on_cpu, self.threads, self.handles = True, 1, []

    def capacity(self):
        return self.number

    def put(self, value):
        return value

    def start(self):
        self.handles.append(LocalHandle(len(self.handles), self.dies))
        return self.handles[-1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool")
    card = toys.dataset_card()
    toys.write(card, root, n=24)
    return toys.subject(card, root)


def settings(folder, *attacks, **more):
    more.setdefault("eps", ("2/255", "6/255"))
    return toys.request(folder, *(attacks or [toys.chain("aa", "ce", "t", "square")]), **more)


def pooled(what, order, cluster, remarks=None):
    """Evaluate with a pool; returns its cluster."""
    pool = Pool(cluster, (remarks if remarks is not None else []).append)
    try:
        list(measure.evaluate(what, order, lambda *_: None, lambda _: None, pool.works))
    finally:
        pool.close()
    return cluster


def same(what, tmp_path, cluster, **more):
    """Whether a pool leaves the very same files as one process; returns the `run` blocks of the pool."""
    toys.run(what, settings(tmp_path / "one", **more))
    pooled(what, settings(tmp_path / "pool", **more), cluster)
    expected, found = outcome(tmp_path / "one"), outcome(tmp_path / "pool")
    assert found == expected
    assert any(name.endswith(".parquet") for name in found)
    return [json.loads(path.read_text())["run"] for path in sorted((tmp_path / "pool/cells").rglob("*.json"))]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_leaves_the_files_of_one_process(world, tmp_path, workers):
    cluster = LocalCluster(workers)
    runs = same(world, tmp_path, cluster)
    assert [run["workers"] for run in runs] == [workers] * 2
    attacks = [sum(isinstance(order.content, Attack) for order in h.orders) for h in cluster.handles]
    assert all(attacks)


def test_images_and_evidence_too(world, tmp_path):
    same(world, tmp_path, LocalCluster(2), save_images=True)
    assert list((tmp_path / "pool/cells").rglob("*.safetensors"))


def test_noise_that_is_drawn_in_batches(world, tmp_path):
    """The reference mode attacks whole batches; one that a lost worker had begun is attacked again whole."""
    lost = iter([True])

    def dies(number, answer):
        return isinstance(answer, Found) and answer.member == 17 and next(lost, False)

    same(world, tmp_path, LocalCluster(2, dies), mode="reference", eps=("4/255",))


def test_images_beside_which_others_are_attacked_again_need_no_finding(world, tmp_path):
    """In the reference mode a batch is attacked whole, though most of its findings are in the ledger."""
    more = {"mode": "reference", "eps": ("4/255",)}
    toys.run(world, settings(tmp_path / "one", **more))
    shutil.copytree(tmp_path / "one/ledger", tmp_path / "pool/ledger")
    for ledger in (tmp_path / "pool/ledger").rglob("*.jsonl"):
        ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    pooled(world, settings(tmp_path / "pool", **more), LocalCluster(2))
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "one")


def test_workers_that_die_at_every_tenth_answer(world, tmp_path):
    answers = iter(range(10_000))

    def dies(number, answer):
        return next(answers) % 10 == 9

    remarks = []
    toys.run(world, settings(tmp_path / "one"))
    cluster = pooled(world, settings(tmp_path / "pool"), LocalCluster(2, dies), remarks)
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "one")
    assert len(cluster.handles) > 4
    assert len(remarks) == len(cluster.handles) - 2
    assert "died; another one is started, and its images are handed out again" in " ".join(remarks)


def test_a_worker_attacks_nothing_again_that_was_found(world, tmp_path):
    """A worker dies after its third finding: those three images are in no later order."""
    found = []

    def dies(number, answer):
        if number or not isinstance(answer, Found):
            return False
        found.append(answer)
        return len(found) == 4

    order = settings(tmp_path, toys.pgd(), eps=("4/255",))
    cluster = pooled(world, order, LocalCluster(1, dies))
    kept = [answer.member for answer in found[:3]]
    later = [o.content.members for o in cluster.handles[1].orders if isinstance(o.content, Attack)]
    assert kept
    assert not {*kept} & {member for members in later for member in members}
    assert found[3].member in later[0]


def test_images_that_no_worker_survives_are_named(world, tmp_path):
    def dies(number, answer):
        return isinstance(answer, Found)

    with pytest.raises(
        Incomplete, match=rf"{LOSSES} workers were lost with toy/test/\S+.*the same command goes on"
    ):
        pooled(world, settings(tmp_path), LocalCluster(1, dies))


def test_a_worker_that_gives_no_answer_is_replaced(world, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "LEAST", 0.05)
    monkeypatch.setattr(cluster_module, "SLOW", 0.0)
    hung = []

    class Hanging(LocalHandle):
        def answers(self, order, references, tick):
            for answer in super().answers(order, references, tick):
                yield answer
                if not hung and isinstance(answer, Found):
                    hung.append(self)
                    while not self.killed.wait(0.02):
                        yield None
                    raise Lost("died")

    class Cluster(LocalCluster):
        def start(self):
            self.handles.append(Hanging(len(self.handles), self.dies))
            return self.handles[-1]

    remarks = []
    toys.run(world, settings(tmp_path / "one"))
    pooled(world, settings(tmp_path / "pool"), Cluster(2), remarks)
    assert hung[0].killed.is_set()
    assert "gave no answer for 0 s; another one is started, and its images" in remarks[0]
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "one")


def test_a_worker_that_joins_is_used(world, tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_vlm.evaluation.pool.LOOK", 0.02)
    cluster = LocalCluster(1, joining=True)

    def dies(number, answer):  # the first finding brings a second worker
        cluster.number = 2 if isinstance(answer, Found) else cluster.number
        return False

    cluster.dies = dies
    chains = [toys.chain("aa", "ce", "t", "fab", "square"), toys.pgd()]
    toys.run(world, settings(tmp_path / "one", *chains))
    pooled(world, settings(tmp_path / "pool", *chains), cluster)
    assert len(cluster.handles) == 2
    assert any(isinstance(order.content, Attack) for order in cluster.handles[1].orders)
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "one")


def test_an_error_of_a_worker_is_raised_as_here(world, tmp_path):
    def broken(images):
        raise ValueError("no such layer")

    with pytest.raises(VlmrobError, match="a worker failed: ValueError: no such layer"):
        pooled(toys.changed(world, broken), settings(tmp_path), LocalCluster(2))
    raised = Failed("InputError", "model x: found; expected y", "trace").raised
    assert type(raised) is InputError
    assert str(raised) == "model x: found; expected y"
    assert raised.exit_code == 2
    assert type(Failed("AttackError", "outside", "").raised) is AttackError


def test_workers_that_do_not_start_end_the_evaluation(world, tmp_path):
    class Cluster(LocalCluster):
        def start(self):
            handle = super().start()
            handle.about = lambda seconds: (_ for _ in ()).throw(Lost("no module robustbench_vlm"))
            return handle

    with pytest.raises(VlmrobError, match=f"{LOSSES} workers in a row did not start: no module"):
        pooled(world, settings(tmp_path), Cluster(1))


def test_of_failed_checks_the_worst_counts():
    def failed(name, value):
        return check(name, "fail", value, 0.1, "")

    class Workers:
        def ask_all(self, cell, order):
            yield Done(
                ([failed("outputs-changed", 0.5), check("gradient-mismatch", "pass", 0.0, 0.1, "")], Cost(2))
            )
            yield Done()  # lost
            yield Done(([failed("outputs-changed", 0.7), failed("gradient-mismatch", 0.2)], Cost(3)))

    class Subjectless(remote_work.RemoteWork):
        def _order(self, content):
            return Order(0, "", content)

    found, cost = Subjectless(Workers(), None, 0, None, on_cpu=True).checks(None)
    assert [(one.name, one.level, one.value) for one in found] == [
        ("outputs-changed", "fail", 0.7),
        ("gradient-mismatch", "fail", 0.2),
    ]
    assert cost.forwards == 5


def test_a_model_that_changes_during_the_attack_is_flagged_as_in_one_process(world, tmp_path):
    """Its answers drift with the number of its calls, so workers see it when they compare at the end."""
    calls = []

    def drifting(images):
        calls.append(len(images))
        return images + 1e-4 * len(calls)

    what = toys.changed(world, drifting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pooled(what, settings(tmp_path, toys.pgd(), eps=("4/255",)), LocalCluster(1))
    (path,) = (tmp_path / "cells").rglob("*.json")
    assert "outputs-changed" in json.loads(path.read_text())["outcome"]["flags"]


def test_workers_are_a_number_or_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    executor.require_workers("")
    executor.require_workers("2")
    for typed in ("0", "-1", "two", "1.5", "²", "auto"):
        with pytest.raises(InputError, match="a number from 1, or ray for the cluster"):
            executor.require_workers(typed)
    with pytest.raises(InputError, match="RAY_ADDRESS is not set"):
        executor.require_workers("ray")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(InputError, match="an address of Ray Client"):
        executor.require_workers("ray")
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed; type: pip install 'robustbench_vlm\[ray\]'"):
        executor.require_workers("2")


def test_side_by_side_keeps_the_order_and_raises_the_first_error():
    held = threading.Event()

    def slow():
        assert held.wait(60)
        return "slow"

    def quick():
        held.set()
        return "quick"

    def broken():
        raise OSError("disk full")

    assert executor.run_concurrently([slow, quick], 2) == ["slow", "quick"]
    held.clear()
    with pytest.raises(OSError, match="disk full"):
        executor.run_concurrently([slow, broken], 2)
    held.set()
    assert executor.run_concurrently([lambda: 1, lambda: 2], 1) == [1, 2]


def test_progress_of_cells_at_once_is_one_line():
    seen = []
    joint = executor.JointProgress(lambda *line: seen.append(line), "4 cells on 2 workers")
    joint("a", 0, 10)
    joint("b", 2, 5)
    joint("a", 4, 10)
    assert seen == [
        ("4 cells on 2 workers", 0, 10),
        ("4 cells on 2 workers", 2, 15),
        ("4 cells on 2 workers", 6, 15),
    ]


def test_every_worker_finds_room_on_the_gpus():
    workers = pytest.importorskip("robustbench_vlm.evaluation.workers")
    for gpus in range(1, 9):
        for number in range(1, 33):
            part = workers.share(gpus, number)
            assert gpus * int(1 / part + 1e-9) >= number
            assert part == 1 or number > gpus
    assert workers.share(0, 4) == 0


def test_python_refuses_what_are_no_workers():
    import robustbench_vlm

    with pytest.raises(InputError, match="--workers two: not a number of workers"):
        robustbench_vlm.evaluate("tiny", "fgsm", workers="two")


def test_a_question_that_waits_while_the_evaluation_fails_is_not_answered_with_nothing():
    pool, live = object.__new__(Pool), LiveWorker(None, None, attacked={0})
    pool._changed, pool._live, pool._open, pool._error = threading.Condition(), [live], {}, None
    threading.Timer(0.05, pool._fail, [VlmrobError("a worker failed elsewhere")]).start()
    with pytest.raises(VlmrobError, match="a worker failed elsewhere"):
        list(pool.ask_all(0, None))


def test_cells_end_before_a_closed_pool_does(world, tmp_path):
    """What measures a cell in a thread of its own writes nothing once the pool is closed."""
    pool = Pool(LocalCluster(1), lambda _: None)
    begun, ended = threading.Event(), []

    def measured():
        with suppress(VlmrobError), pool.works(cells.Cell(world, order.chains[0], order, order.ladder[:1])):
            begun.set()
            while pool._error is None:
                time.sleep(0.01)
            time.sleep(0.1)  # what is left to do
            ended.append(True)

    order = settings(tmp_path)
    threading.Thread(target=measured, daemon=True).start()
    assert begun.wait(60)
    pool.close()
    assert ended
    with (
        pytest.raises(VlmrobError, match="the evaluation was stopped"),
        pool.works(cells.Cell(world, order.chains[0], order, order.ladder[:1])),
    ):
        pass


def test_a_question_that_no_worker_can_answer_any_more_is_the_pools_error():
    pool = object.__new__(Pool)
    pool._changed, pool._live, pool._error = threading.Condition(), [], VlmrobError("no worker is left")
    with pytest.raises(VlmrobError, match="no worker is left"):
        list(pool.ask_all(0, None))
