"""A training that is stopped keeps what it has, says how to go on, and comes to the same result."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from train_ref import evaluate, train
from train_ref.data import ImageData
from train_ref.evaluate import Accuracies
from train_ref.unfinished import NAME

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "simclr": "--method simclr supcon --quick --epochs 1 --loss reference --seeds 2",
    "clip": "--method clip simclr --quick --epochs 1 --loss both",
}
TRAININGS = 4


@pytest.fixture(autouse=True)
def cheap_evaluation() -> Iterator[None]:
    """Of networks on images: a number that depends on their weights, in no time."""

    def evaluate_encoder(encoder: torch.nn.Module, data: ImageData) -> Accuracies:
        return Accuracies(*(sum(weight.double().abs().sum().item() for weight in encoder.parameters()) / n for n in (1e5, 2e5, 3e5)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_encoder", evaluate_encoder)
        yield


def stop_at(monkeypatch: pytest.MonkeyPatch, training: int, error: type[BaseException]) -> None:
    """The training of that number, counted from 0, ends in an error."""
    whole: Callable[..., Any] = train.train_network
    begun = iter(range(TRAININGS))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if next(begun) == training:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(train, "train_network", stopped)


def result(folder: Path) -> Any:
    """The findings of a run, without its times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "cpu_seconds")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return timeless(json.loads((folder / "result.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("which", RUNS)
def test_a_run_that_was_stopped_goes_on_to_the_same_result(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    arguments = RUNS[which].split()
    assert train.main([*arguments, "--out", str(whole)]) == 0
    assert not (whole / NAME).exists()

    stop_at(monkeypatch, 2, KeyboardInterrupt)
    capsys.readouterr()
    assert train.main([*arguments, "--out", str(halved)]) == 130
    (said,) = capsys.readouterr().err.splitlines()
    said, command = said.split("; to go on: python ")
    assert said == f"train.py: interrupted; 2 of 4 trainings are finished and kept in {halved / NAME}"
    assert [path.name for path in halved.iterdir()] == [NAME]

    # The next one gets no further, and loses nothing.
    script, *again = shlex.split(command)
    assert Path(script).resolve() == ROOT / "train_ref" / "train.py"
    monkeypatch.undo()
    stop_at(monkeypatch, 0, OSError)
    assert train.main(again) == 1
    assert f"2 of 4 trainings are finished and kept in {halved / NAME}; to go on: python {command}" in capsys.readouterr().err

    monkeypatch.undo()
    assert train.main(again) == 0
    assert capsys.readouterr().out.count("epoch 1/") == 2
    assert result(halved) == result(whole)
    assert not (halved / NAME).exists()


def test_nothing_is_kept_where_nothing_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 0, KeyboardInterrupt)
    assert train.main([*RUNS["simclr"].split(), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "train.py: interrupted; 0 of 4 trainings are finished\n"
    assert list(tmp_path.iterdir()) == []


def changed(content: dict[str, Any], part: str, name: str, value: Any) -> str:
    return json.dumps(content | {part: content[part] | {name: value}})


@pytest.mark.parametrize("which", RUNS)
def test_only_the_same_run_goes_on(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*RUNS[which].split(), "--out", str(tmp_path)]

    def refused(*more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            train.main([*arguments, "--resume", *more])
        assert left.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert f"argument --resume: there is no {tmp_path / NAME}; --out names the folder of a run that was stopped" in refused()
    stop_at(monkeypatch, 1, KeyboardInterrupt)
    assert train.main(arguments) == 130
    whole = (tmp_path / NAME).read_text(encoding="utf-8")
    assert f"argument --resume: {tmp_path / NAME} is of a run with another batch_size; without --resume" in refused("--batch-size", "64")
    content = json.loads(whole)
    other = {"another version": changed(content, "about", "versions", {}), "another configuration": changed(content, "about", "config", {})}
    for text in other.values():
        (tmp_path / NAME).write_text(text, encoding="utf-8")
        assert "is of a run with another " in refused()
    for text in (
        "",
        whole[: len(whole) // 2],
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps(content | {"runs": [{}]}),
        json.dumps(content | {"runs": 1}),
    ):
        (tmp_path / NAME).write_text(text, encoding="utf-8")
        assert f"argument --resume: {tmp_path / NAME} is damaged" in refused()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c(tmp_path: Path) -> None:
    """Once the second training has begun."""
    command = [sys.executable, "train_ref/train.py", "--method", "simclr", "--loss", "reference", "--seeds", "2", "--quick"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # As from a terminal: a process that a shell starts in the background ignores Ctrl-C, and so would its children.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if "seed 1  epoch 1/2" in line:
                process.send_signal(signal.SIGINT)
                break
        (said,) = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert said.startswith(
        f"train.py: interrupted; 1 of 2 trainings are finished and kept in {tmp_path / NAME}; to go on: python train_ref/train.py "
    )
    assert len(json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["runs"]) == 1
