"""`vlmrob slurm`: the scripts as they are, and run here with stand-ins for Slurm's programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run_command

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = {
    "slurm-eval-one": ["eval", "--model", "a b", "--suite", "zeroshot", "--attack", "autoattack"],
    "slurm-eval-many": ["--nodes", "2", "--sbatch", "--partition=gpu", "eval", "--model", "ViT-B-32:openai"],
    "slurm-eval-processors": ["--gpus", "0", "--cpus", "16", "--time", "90", "eval", "--model", "tiny"],
    "slurm-train-one": ["--cpus", "64", "train", "mmt-ard", "--set", "optim.steps=9"],
    "slurm-train-many": ["--nodes", "4", "--restarts", "3", "train", "mmt-ard"],
}


@pytest.fixture
def slurm(monkeypatch, capsys):
    def run(*words):
        code = run_command(monkeypatch, "slurm", *words)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_the_golden_one_and_bash_reads_it(name, slurm, tmp_path):
    code, out, err = slurm(*SCRIPTS[name])
    assert (code, err) == (0, "")
    assert out == (GOLDEN / f"{name}.sh").read_text()
    path = tmp_path / "job.sh"
    path.write_text(out)
    subprocess.run(["bash", "-n", path], check=True)


def test_what_was_typed_arrives_as_it_was_typed(slurm, tmp_path):
    hostile = "a b; touch x $(touch y) 'q' \"z\""
    (tmp_path / "cards dir").mkdir()
    _, out, _ = slurm("--include", tmp_path / "cards dir", "eval", "--model", hostile)
    job = Job(tmp_path, out)
    job.start("printf '%s\\n' \"$@\" > seen")
    assert job.wait() == 0
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen == ["--include", str(tmp_path / "cards dir"), "eval", "--model", hostile, "--workers", "8"]
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


class Job:
    """A script that runs here: srun runs its words, scontrol notes its own, vlmrob does what a test says."""

    def __init__(self, folder, script):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / "job.sh").write_text(script)
        self.program("srun", 'exec "$@"')
        self.program(
            "scontrol", f'if [ "$1" = show ]; then echo n1; echo n2; else echo "$@" >> {folder}/scontrol; fi'
        )

    def program(self, name, text):
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def start(self, vlmrob, restarted=0):
        self.program("vlmrob", vlmrob)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restarted)}
        environment = os.environ | slurm | {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.process = subprocess.Popen(["bash", "job.sh"], cwd=self.folder, env=environment)

    def wait(self):
        return self.process.wait(timeout=60)

    @property
    def asked(self):
        path = self.folder / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(slurm, tmp_path):
    _, out, _ = slurm("--restarts", 3, "eval", "--model", "tiny")
    return Job(tmp_path, out)


@pytest.mark.parametrize(("code", "asked"), [(0, []), (2, []), (3, []), (75, ["requeue 17"])])
def test_only_what_goes_on_is_queued_again(code, asked, job):
    job.start(f"exit {code}")
    assert job.wait() == code
    assert job.asked == asked


def test_a_job_is_not_queued_again_for_ever(job):
    job.start("exit 75", restarted=3)
    assert job.wait() == 75
    assert job.asked == []


@pytest.mark.parametrize(
    ("ends", "code"), [("sleep 1; exit 75", 75), ("exit 0", 0), ("trap - TERM; kill -TERM $$", 143)]
)
def test_the_signal_before_the_end_reaches_the_command(ends, code, job):
    job.start(f"trap '{ends}' TERM\ntouch ready\nwhile true; do sleep 0.05; done")
    began = time.monotonic()
    while not (job.folder / "ready").exists():
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == code
    assert job.asked == (["requeue 17"] if code else [])


def test_several_machines_begin_at_the_first_one(slurm, tmp_path):
    _, out, _ = slurm("--nodes", 2, "eval", "--model", "tiny")
    job = Job(tmp_path, out)
    job.program("ray", "printf '%s ' \"$@\" > seen")
    job.start("exit 9")
    assert job.wait() == 0
    seen = (tmp_path / "seen").read_text().split()
    assert seen[:3] == ["symmetric-run", "--address", "n1:6379"]
    assert seen[-5:] == ["eval", "--model", "tiny", "--workers", "ray"]


def test_submit_gives_the_very_script_to_sbatch(tmp_path):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ncat > {tmp_path}/given; echo Submitted batch job 9\n")
    (tmp_path / "sbatch").chmod(0o755)
    words = [sys.executable, "-m", "robustbench_vlm", "slurm", "--submit", "eval", "--model", "tiny"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | path)
    assert (tmp_path / "given").read_text() == done.stdout
    assert "Submitted batch job 9" in done.stderr
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho no such partition >&2; exit 1\n")
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | path)
    assert done.returncode == 1
    assert "sbatch: no such partition" in done.stderr
    (tmp_path / "sbatch").unlink()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "no sbatch on this machine" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["leaderboard"], "eval or train"),
        (["--nods", "2", "eval"], "eval or train"),
        (["eval", "--workers", "4"], "leave it out"),
        (["train", "x", "--nproc=4"], "leave it out"),
        (["--time", "soon", "eval"], "days-hours"),
        (["--sbatch", "a\nb", "eval"], "an option of sbatch"),
    ],
)
def test_wrong_input_is_one_line(words, said, slurm):
    code, out, err = slurm(*words)
    assert (code, out) == (2, "")
    assert said in err
