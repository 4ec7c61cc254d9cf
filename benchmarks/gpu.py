"""What can only be measured on a GPU, in minutes: the parts of `bash benchmarks/gpu.sh`.

`tests` runs the tests that need a GPU, `attacks` our AutoAttack beside the references on a ViT-B-32 at 224 px
in fp32, TF32 and bf16 and with several numbers of rows, `training` a step of MMT-ARD of a ViT-B-32 from two
ViT-L-14. Each appends what it measures to a file gpu-PART.jsonl at once, so that a part that ran out of time
leaves what it has, and goes on from there. `page` writes gpu.md from these files.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import attacks
import gpu_page
import torch
import training
from engines import PACKAGES, REFERENCES
from process import about, begun
from subject import load, radii

from robustbench_vlm import store
from robustbench_vlm.evaluation.gpus import GPUS

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
PARTS = ("tests", "attacks", "training", "page")
PRECISIONS = {"fp32": {}, "tf32": {"tf32": True}, "bf16": {"format": "bf16"}}

Line = dict[str, Any]

FULL = {
    "arch": "ViT-B-32",
    "px": 224,
    "rows": [256, 64, 1024],
    "n": 256,  # images, or as many as there are rows
    "looked": 64,  # images by which radii are looked for
    "size": {"steps": 10, "queries": 50, "targets": 2},
    "shares": [0.0, 0.3, 0.6],
    "every": 8,
    "teacher": "ViT-L-14",
    "batch": [128, 512],
    "training": ["--precision", "fp32", "bf16", "--steps", "2", "--rounds", "3", "--warm", "1"],
}
TINY = {
    **FULL,
    "arch": "vlmrob-tiny",
    "px": 32,
    "rows": [4],
    "n": 4,
    "looked": 4,
    "size": {"steps": 2, "queries": 4, "targets": 2},
    "shares": [0.5],
    "every": 2,
    "teacher": "vlmrob-tiny-teacher",
    "batch": [4],
    "training": ["--precision", "fp32", "--steps", "1", "--rounds", "1", "--warm", "0"],
}


def parsed(words: list[str] | None) -> Namespace:
    """The command line."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    asked.add_argument("part", choices=PARTS)
    asked.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    asked.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script itself")
    asked.add_argument("--out", type=Path, default=HERE, help="folder of gpu.md and its .jsonl files")
    what = asked.parse_args(words)
    if what.part != "page" and what.device == "cuda" and not torch.cuda.is_available():
        asked.error("no CUDA device here; try the script itself with --device cpu --tiny")
    return what


def run_tests(what: Namespace) -> None:
    """Run the tests that need a GPU; on a CPU they are only collected."""
    files = [str(p) for p in sorted(TESTS.glob("test_*.py")) if "\n@pytest.mark.gpu" in p.read_text("utf-8")]
    words = [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", *files]
    words += ["--collect-only"] * (what.device == "cpu")
    ran = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    said = [line for line in ran.stdout.splitlines() if line.strip()]
    path = gpu_page.file_of(what.out, "tests")
    path.unlink(missing_ok=True)
    store.append(path, about(what))
    store.append(path, {"exit": ran.returncode, "said": said[-1] if said else ran.stderr[-200:]})


def cases(what: Namespace, size: Line) -> Iterator[Line]:
    """What is to be attacked, by whom: all engines of one shape and precision beside each other."""
    present = [name for name in REFERENCES if importlib.util.find_spec(PACKAGES[name]) is not None]
    for rows in size["rows"]:
        for precision, numerics in PRECISIONS.items():
            if precision == "tf32" and what.device == "cpu":
                continue
            for share in size["shares"]:
                for engine in ["ours", *present]:
                    if engine == "ours" or precision != "bf16":  # bf16 is a way of ours to find
                        label = engine if precision == "fp32" else f"{engine} {precision}"
                        yield {
                            **{"rows": rows, "precision": precision, "share": share, "engine": label},
                            "numerics": numerics,
                        }


def name_of(line: Line) -> tuple[Any, ...]:
    """What tells the lines of a run apart."""
    return line["rows"], line["share"], line["engine"]


def run_attacks(what: Namespace, size: Line) -> None:
    """Measure the chain of AutoAttack in this one process, so that the GPU is started once."""
    path = gpu_page.file_of(what.out, "attacks")
    known = begun(path, what)
    most = max(size["n"], *size["rows"])
    settings = Namespace(model="", arch=size["arch"], px=size["px"], device=what.device)
    subject = load(settings, range(most))
    found = next((line["radii"] for line in known[1:] if "radii" in line), None)
    if found is None:
        found = radii(subject.first(size["looked"]), size["shares"])
        store.append(path, {"radii": found})
    eps = dict(zip(size["shares"], found, strict=True))
    done = {name_of(line) for line in known[1:] if "engine" in line}
    ahead = [case for case in cases(what, size) if name_of(case) not in done]
    for number, case in enumerate(ahead, 1):
        who = replace(subject.first(max(size["n"], case["rows"])), rows=case["rows"])
        plan = {
            **{"share": case["share"], "norm": "linf", "eps255": eps[case["share"]], "attack": attacks.WHOLE},
            **{"engine": case["engine"], "precision": case["numerics"]},
            **{"size": size["size"], "every": size["every"]},
        }
        if what.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        line = {**attacks.measure(plan, who), "precision": case["precision"], "n": len(who.keys)}
        store.append(path, line)
        shown = f"{case['rows']} rows, {case['engine']}: {line['robust']} robust, {line['wall']:.2f} s"
        print(f"{number}/{len(ahead)} {shown}", file=sys.stderr, flush=True)


def run_training(what: Namespace, size: Line) -> None:
    """Measure training steps by `training.py`."""
    words = ["--out", str(gpu_page.file_of(what.out, "training").with_suffix(".md")), "--device", what.device]
    words += ["--arch", size["arch"], "--teacher", size["teacher"], *size["training"]]
    words += ["--batch", *map(str, size["batch"]), "--one-process"]
    device = torch.cuda.get_device_name() if what.device == "cuda" else ""
    peak = next((gpu for name, gpu in GPUS.items() if name.replace("-", " ") in device), None)
    if peak is not None:
        words += ["--peak", str(peak.fp32), str(peak.bf16)]
    training.main(words)


def main(words: list[str] | None = None) -> None:
    """Do one part."""
    what = parsed(words)
    what.out.mkdir(parents=True, exist_ok=True)
    size = TINY if what.tiny else FULL
    if what.part == "tests":
        run_tests(what)
    elif what.part == "attacks":
        run_attacks(what, size)
    elif what.part == "training":
        run_training(what, size)
    else:
        planned = {name_of(case): case for case in cases(what, size)}
        text = gpu_page.render(what.out, size, planned)
        store.write(what.out / "gpu.md", text.encode())
        print(text)


if __name__ == "__main__":
    main()
