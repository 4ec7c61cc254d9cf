"""Results in the format of Every Eval Ever (arXiv:2606.14516), schema 0.3.0, a shared schema for evaluations.

One log a model and contest, with clean and robust accuracy of each dataset, and beside it one line for each
image and accuracy. Their format has texts where ours has numbers, and no place for checks or for evidence.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import result_file, stats, stop_rule, verdicts
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.version import __version__

SCHEMA = "0.3.0"
NAME = "vlmrob"


@dataclass(frozen=True)
class Source:
    """Who reports the results.

    Attributes:
        organization: who ran the evaluation.
        developer: who made the models that do not name their maker, as `hf-hub:ORG/NAME` does.
    """

    organization: str
    developer: str


@dataclass(frozen=True)
class Measured:
    """One accuracy of one result.

    Attributes:
        result: which.
        kind: `clean` or `robust`.
    """

    result: Result
    kind: str

    @property
    def id(self) -> str:
        """What joins the lines of images to their accuracy."""
        return f"{self.result.dataset}/{self.kind}/{self.result.content.sha256[:16]}"

    @property
    def name(self) -> str:
        """Name of the evaluation."""
        return f"{NAME}.{self.result.dataset}.{self.kind}"

    @property
    def count(self) -> int:
        """Images that are right."""
        outcome, last = self.result.outcome, self.result.stages[-1]
        return int(outcome["clean_correct"] if self.kind == "clean" else outcome["robust"][last])


def write(results: Path, out: Path, source: Source) -> list[Path]:
    """Write the results below a folder as `data/vlmrob/<developer>/<model>/<uuid>.json` and their images.

    The same results give the same bytes.

    Args:
        results: folder of the results.
        out: folder that gets `data/`.
        source: who reports them.

    Returns:
        The files.

    Raises:
        DataError: no results, or one that cannot be read.
    """
    groups: dict[tuple[tuple[str, str], Contest], list[Result]] = {}
    for result in result_file.read(results):
        groups.setdefault((result.model, result.contest), []).append(result)
    if not groups:
        what = f"no results below {result_file.FOLDER}/"
        raise DataError(str(results), what, "at least one", "run vlmrob eval")
    written: list[Path] = []
    for key in sorted(groups):
        written += _log(sorted(groups[key], key=lambda result: result.dataset), out, source)
    return written


def _log(results: Sequence[Result], out: Path, source: Source) -> list[Path]:
    """Write the log of a model in a contest, and the lines of its images."""
    first = results[0]
    developer, name = _identity(first.model[0], source)
    seconds = str(max(_measured_at(result) for result in results))
    contest = first.contest
    identity = f"{NAME}/{developer}/{name}/{first.model[1][:16]}/{contest.digits}/{seconds}"
    number = uuid.UUID(bytes=hashlib.sha256(identity.encode()).digest()[:16], version=4)
    folder = Path("data") / NAME / store.file_name(developer) / store.file_name(name)
    beside = folder / f"{number}_samples.jsonl"
    accuracies = [Measured(result, kind) for result in results for kind in ("clean", "robust")]
    shared = {
        "schema_version": SCHEMA,
        "evaluation_id": identity,
        "model_id": f"{developer}/{name}",
    }
    lines = [line for one in accuracies for line in _lines(one, shared)]
    samples = "".join(f"{line}\n" for line in lines).encode()
    log = {
        "schema_version": SCHEMA,
        "evaluation_id": identity,
        "evaluation_timestamp": seconds,
        "retrieved_timestamp": seconds,
        "source_metadata": {
            "source_name": NAME,
            "source_type": "evaluation_run",
            "source_organization_name": source.organization,
            "evaluator_relationship": "first_party" if developer == source.organization else "third_party",
        },
        "eval_library": {
            "name": NAME,
            "version": __version__,
            "additional_details": _texts({"engine": contest.engine, "precision": contest.precision}),
        },
        "model_info": _model(first, f"{developer}/{name}", developer),
        "evaluation_results": [_accuracy(one, seconds) for one in accuracies],
        "detailed_evaluation_results": {
            "format": "jsonl",
            "file_path": beside.as_posix(),
            "hash_algorithm": "sha256",
            "checksum": hashlib.sha256(samples).hexdigest(),
            "total_rows": len(lines),
        },
    }
    store.write(out / beside, samples)
    path = out / folder / f"{number}.json"
    store.write_json(path, log)
    return [path, out / beside]


def _identity(model: str, source: Source) -> tuple[str, str]:
    """Maker and name of a model; the maker is taken from `hf-hub:ORG/NAME`, and nothing else is guessed."""
    hub, _, name = model.partition(":")
    maker, _, own = name.partition("/")
    return (maker, own) if hub == "hf-hub" and maker and own else (source.developer, model)


def _measured_at(result: Result) -> int:
    """Unix time at which a result was finished, in seconds."""
    found = store.read_json(result.path).get("run", {})
    try:
        return int(datetime.datetime.fromisoformat(found["date"]).timestamp())
    except (KeyError, TypeError, ValueError):
        where = f"{result.path}, run.date"
        raise DataError(where, "no date", "an ISO 8601 date", "run the same eval again") from None


def _model(result: Result, identity: str, developer: str) -> dict[str, Any]:
    facts = result.content.model
    known = {
        "deployment_type": "self_deployed",
        "model_availability": "unknown",
        "sha256": result.model[1],
        **{name: facts[name] for name in ("arch", "parameters", "defense", "train_norm", "train_eps")},
    }
    return {
        "name": result.model[0],
        "id": identity,
        "developer": developer,
        "inference_engine": {"name": NAME, "version": __version__},
        "additional_details": _texts(known),
    }


def _accuracy(one: Measured, seconds: str) -> dict[str, Any]:
    """The entry of one accuracy, with its Wilson interval."""
    result, n = one.result, one.result.outcome["n"]
    confidence = stop_rule.confidence(result.contest.stop_rule)
    interval = stats.wilson(one.count, n, confidence)
    robust = one.kind == "robust"
    contest = result.contest.columns
    attack = {name: contest[name] for name in ("attack", "attack_config_sha256", "norm", "eps", "eps_ladder")}
    subset = {"subset_sha256": result.config["subset_sha256"], "seed": result.config["seed"]}
    about = "that are right under every attack of the chain" if robust else "that are right without attack"
    return {
        "evaluation_result_id": one.id,
        "evaluation_name": one.name,
        "source_data": _dataset(result),
        "evaluation_timestamp": seconds,
        "metric_config": {
            "evaluation_description": f"share of images {about}",
            "metric_id": f"{NAME}.robust-accuracy" if robust else "accuracy",
            "metric_name": "robust accuracy" if robust else "accuracy",
            "metric_kind": "accuracy",
            "metric_unit": "proportion",
            "metric_parameters": _texts(attack) if robust else {},
            "lower_is_better": False,
            "score_type": "continuous",
            "min_score": 0.0,
            "max_score": 1.0,
        },
        "score_details": {
            "score": one.count / n,
            "details": _texts({**subset, "flags": ";".join(result.outcome["flags"])}),
            "uncertainty": {
                "confidence_interval": {
                    "lower": interval.low,
                    "upper": interval.high,
                    "confidence_level": confidence,
                    "method": "wilson",
                },
                "num_samples": n,
            },
        },
        "generation_config": {"additional_details": _texts(attack if robust else {"attack": "none"})},
    }


def _dataset(result: Result) -> dict[str, Any]:
    """Where the images of a result come from, as far as a card at hand says so."""
    name = result.dataset
    card = reader.read("datasets", name, DatasetCard) if reader.has("datasets", name) else None
    details = _texts({"exposure": result.outcome["exposure"], "canvas_px": result.config["canvas_px"]})
    if card is None or not card.source.hub:
        return {"dataset_name": name, "source_type": "other", "additional_details": details}
    return {
        "dataset_name": name,
        "source_type": "hf_dataset",
        "hf_repo": card.source.hub,
        "hf_split": result.contest.split,
        "samples_number": result.outcome["n"],
        "additional_details": details,
    }


def _lines(one: Measured, shared: Mapping[str, str]) -> Iterator[str]:
    """One line an image: its label, the class that the model gives it, and whether that is right."""
    table = one.result.verdicts()
    right = table.clean_correct if one.kind == "clean" else verdicts.standing(table)
    for image, correct in zip(table.to_dict("records"), right, strict=True):
        attacked = one.kind == "robust" and image["broken_by"]
        prediction = str(image["adv_prediction"] if attacked else image["clean_prediction"])
        given = {"raw": image["key"], "reference": [str(image["label"])]}
        line = {
            **shared,
            "evaluation_name": one.name,
            "evaluation_result_id": one.id,
            "sample_id": image["key"],
            "sample_hash": hashlib.sha256(_hashed(given)).hexdigest(),
            "interaction_type": "single_turn",
            "input": given,
            "output": {"raw": [prediction]},
            "answer_attribution": [
                {
                    "turn_idx": 0,
                    "source": "output.raw",
                    "extracted_value": prediction,
                    "extraction_method": "argmax over the classes",
                    "is_terminal": True,
                }
            ],
            "evaluation": {"score": float(correct), "is_correct": bool(correct)},
            "metadata": _texts(
                {name: image[name] for name in ("image_sha256", "broken_by", "broken_at_eps", "error")}
            ),
        }
        yield json.dumps(line, ensure_ascii=False, allow_nan=False)


def _hashed(given: Mapping[str, Any]) -> bytes:
    """The bytes that the schema's makers take the hash of a sample of, which differ from our own spelling."""
    return json.dumps(given, sort_keys=True, separators=(",", ":")).encode()


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as texts, which is what the schema has for everything of one's own."""
    return {name: "" if value is None else str(value) for name, value in values.items()}
