"""The gates of train_ref/gates, put to the test: every fault of mutants.py fails its gate, and sound losses pass all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import mutants
import pytest
import torch
from mutants import MUTANTS, Mutant, cosine_of_dz, subject, tiled
from named import ON_CPU
from torch import Tensor

from train_ref import validate
from train_ref.data import N_TRAIN, load_digits
from train_ref.evaluate import Accuracies
from train_ref.gates import cases, limits
from train_ref.gates.figure import save_figure
from train_ref.gates.formula import formula
from train_ref.gates.free_run import free_run, same_order
from train_ref.gates.operator import operator
from train_ref.gates.outcome import equivalence, outcome
from train_ref.gates.replay import Recording, record, replay
from train_ref.gates.report import GATES, Report, markdown
from train_ref.gates.scenes import SCENES
from train_ref.gates.student import t_quantile
from train_ref.gates.subject import Subject, dtype_name, noise_control
from train_ref.gates.trainings import Run, Trainings
from train_ref.gates.verdict import Check, Verdict, worst
from train_ref.implementations import LossFunctions, dense_losses, fused_losses
from train_ref.truth import LOSSES, losses

ROOT = Path(__file__).resolve().parent.parent
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@cache
def problems() -> tuple[cases.Case, ...]:
    """Every kind of the full gate in small; 120 rows of one side are ragged in the tiles of mutants.py."""
    return tuple(cases.cases(pairs=30, large=120, wide=20))


@cache
def recordings() -> tuple[Recording, ...]:
    """Twelve steps of every scene, stopped at four."""
    data = load_digits()
    return tuple(record(name, data.images[:N_TRAIN], data.labels[:N_TRAIN], steps=12, checkpoints=4, batch_size=100) for name in SCENES)


@cache
def trainings() -> Trainings:
    """The first fifteen of two hundred steps."""
    return Trainings(load_digits(), stop_after=3)


def sound() -> list[Subject]:
    """Without a fault: other orders of the reference's sums, tiles, and the backends. Some sums are as good as float32's only."""
    implementations = [("tiled", tiled()), *((name, fused_losses(name)) for name in (*ON_CPU, "auto"))]
    controls = [replace(control, dtype=dtype) for control in (noise_control(), noise_control("rotated")) for dtype in (FLOAT32, BFLOAT16)]
    return controls + [Subject(name, functions, dtype) for name, functions in implementations for dtype in (FLOAT32, BFLOAT16)]


def passes(verdict: Verdict, whole: bool = False) -> None:
    """whole: and nothing of the gate was left out."""
    assert verdict.checks and verdict.status == "pass", verdict.failed or verdict.missing
    assert not whole or verdict.not_run == []


# What must pass and what must fail ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("who", sound(), ids=lambda who: who.label)
def test_what_is_sound_passes(who: Subject, request: pytest.FixtureRequest) -> None:
    fastnce, verdicts = who.name in (*ON_CPU, "auto"), [formula]
    if who.name == "cpu":
        request.getfixturevalue("compiled")
        # It has no float64.
        assert formula(who).status == "not run"
        verdicts = []
    for verdict in (*(gate(who) for gate in verdicts), operator(who, problems()), replay(who, recordings())):
        passes(verdict, whole=fastnce)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiled", *ON_CPU, "auto"])
def test_float16_passes_where_it_has_limits(name: str, request: pytest.FixtureRequest) -> None:
    if name == "cpu":
        request.getfixturevalue("compiled")
    who = Subject(name, tiled() if name == "tiled" else fused_losses(name), torch.float16)
    passes(operator(who, problems()), whole=name != "tiled")
    for verdict in (replay(who, recordings()), free_run(who, trainings(), 1), outcome(who, trainings(), 5)):
        assert verdict.status == "not run" and verdict.not_run and not verdict.checks


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_fault_fails_the_gate_it_is_assigned_to(mutant: Mutant) -> None:
    who = subject(mutant)
    gates = {"formula": lambda: formula(who), "operator": lambda: operator(who, problems()), "replay": lambda: replay(who, recordings())}
    verdict = gates[mutant.gate]()
    assert verdict.status == "fail"
    # By a wide margin: no verdict of this table hangs on the last digit of a limit.
    assert worst(verdict.failed).used > 3


def test_every_named_fault_is_a_fault_of_the_tiled_losses() -> None:
    """A misspelt fault would inject nothing, and its gate could not fail it."""
    source = Path(mutants.__file__).read_text()
    for mutant in MUTANTS:
        assert source.count(f'"{mutant.fault}"') >= 2
    assert len({mutant.fault for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
def test_free_run_passes_what_is_sound_and_fails_a_first_step_that_differs() -> None:
    fused = fused_losses("torch")
    for who in (*trainings().controls, Subject("tiled", tiled()), Subject("torch", fused), Subject("torch", fused, BFLOAT16)):
        verdict = free_run(who, trainings(), 5 if who in trainings().controls else 2)
        passes(verdict)
        assert [check.name for check in verdict.checks] == ["step 1", "steps 1-10", "steps 1-15"]
        assert len(verdict.notes["deviation"]) == len(verdict.notes["control"]) == 15
    assert free_run(trainings().controls[0], trainings(), 4).status == "not run"
    failed = free_run(Subject("self kept", tiled("self kept")), trainings(), 2)
    assert failed.status == "fail" and "step 1" in {check.name for check in failed.failed}


def test_a_training_that_ends_in_nan_fails() -> None:
    nan = dense_losses().but(nt_xent=lambda z0, z1, temperature: losses.nt_xent(z0, z1, temperature).mean() * math.nan)
    who = Subject("nan", nan)
    assert all(not check.passed for check in free_run(who, trainings(), 1).checks)
    assert replay(who, recordings()[:1]).status == operator(who, problems()[:1]).status == "fail"


def test_cosine_does_not_see_what_replay_sees() -> None:
    """Half of the gradient's length is missing, and its cosine with the right one is 1."""
    functions = tiled("no scale")
    for checkpoint in recordings()[0].checkpoints:
        assert cosine_of_dz(functions, checkpoint) > 1 - 1e-9
    found = {check.name: check.measured for check in replay(Subject("no scale", functions), recordings()[:1]).checks}
    assert found["simclr dz"] == pytest.approx(0.5, abs=1e-4)


# The parts of the gates -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "option"), [(loss, option) for option in ("", "ids", "exclude ids", "weight") for loss in cases.OPTIONS.get(option, LOSSES)]
)
def test_rows_in_another_order_come_back_to_their_places(loss: str, option: str) -> None:
    """float64, so that the order is all that differs."""
    case = cases.Case(loss, pairs=13, d=5, temperature=0.2, option=option)
    sides, scale = case.sides(torch.float64), torch.tensor(5.0, dtype=torch.float64)
    (rows, mean), *others = (limits.of_rows(case, order)(sides, scale) for order in range(limits.ORDERS))
    assert len(rows.unique()) > 1
    for other, its_mean in others:
        torch.testing.assert_close(other, rows, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(its_mean, mean, rtol=1e-13, atol=0)


def test_cases_are_what_their_names_say() -> None:
    found = list(cases.cases())
    kinds = {(case.loss, case.kind, case.temperature) for case in found}
    assert {
        (loss, kind, t) for loss in LOSSES for kind in ("random", "aligned", "solved", "identical", "orthogonal") for t in (0.02, 0.5)
    } <= kinds
    for loss in LOSSES:
        rows = torch.cat(cases.Case(loss, "identical").sides(BFLOAT16)).double()
        assert torch.nn.functional.cosine_similarity(rows, rows[:1]).min() > 1 - 1e-12
    solved = cases.Case("nt_xent", "solved", temperature=0.05)
    assert 1e-7 < losses.nt_xent(*solved.sides(torch.float64), temperature=0.05).mean().item() < 1e-3
    identical = cases.Case("nt_xent", "identical")
    assert losses.nt_xent(*identical.sides(torch.float64)).mean().item() == pytest.approx(math.log(2 * identical.pairs - 1))
    labels = cases.Case("sup_con").labels()
    assert labels is not None and (labels < 0).any() and (labels.unique(return_counts=True)[1] == 1).any()


def refusing(**where: Callable[..., Tensor]) -> LossFunctions:
    """The dense losses, which refuse info_nce on more than one dimension, or whatever else is asked."""

    def info_nce(query: Tensor, positive_key: Tensor, temperature: float = 0.1) -> Tensor:
        if query.shape[1] > 1:
            raise NotImplementedError("one dimension only")
        return losses.info_nce(query, positive_key, temperature=temperature).mean()

    return dense_losses().but(info_nce=info_nce, **where)


def test_refusing_nearly_everything_is_no_pass() -> None:
    verdict = operator(Subject("narrow", refusing()), problems())
    assert verdict.status == "not run" and verdict.checks and not verdict.failed
    assert "info_nce: every call with aligned rows was refused" in verdict.missing
    assert any(line.startswith("info_nce: ") and "calls refused: one dimension only" in line for line in verdict.not_run)
    assert formula(Subject("narrow", refusing())).status == "not run"

    def refused(z0: Tensor, z1: Tensor, temperature: float = 0.5) -> Tensor:
        raise NotImplementedError("not today")

    who = Subject("refusing", refusing(nt_xent=refused))
    assert replay(who, recordings()).status == "not run" and "simclr: not today" in replay(who, recordings()).not_run
    for untrained in (free_run(who, trainings(), 1), outcome(who, trainings(), 5), formula(who)):
        assert untrained.status == "not run" and untrained.not_run == ["everything: not today"]


def test_batches_in_another_order_fail_no_subject() -> None:
    same_order([Run([], ["a", "b"], None, load_digits()), Run([], ["a"], None, load_digits())])
    with pytest.raises(RuntimeError, match="different orders"):
        same_order([Run([], ["a", "b"], None, load_digits()), Run([], ["a", "c"], None, load_digits())])


def test_quantiles_of_student_t() -> None:
    """Against the table of the Handbook of Mathematical Functions, 26.10, to its three decimals."""
    table = {
        (0.95, 1): 6.314,
        (0.95, 2): 2.920,
        (0.95, 4): 2.132,
        (0.95, 9): 1.833,
        (0.95, 30): 1.697,
        (0.975, 5): 2.571,
        (0.75, 10): 0.700,
    }
    for (p, degrees), expected in table.items():
        assert t_quantile(p, degrees) == pytest.approx(expected, abs=6e-4)
    with pytest.raises(ValueError, match="p is 0.4"):
        t_quantile(0.4, 3)


def test_equivalence_of_differences_by_hand() -> None:
    """Mean 0.002, sd 0.001 * sqrt(2.5) of five; t = 2.1318 with 4 degrees of freedom, 0.9410 for a power of 0.8."""
    found = equivalence([0.0, 0.001, 0.002, 0.003, 0.004])
    error = 0.001 * math.sqrt(2.5 / 5)
    assert found.mean == pytest.approx(0.002) and found.sd == pytest.approx(0.001 * math.sqrt(2.5))
    assert (found.low, found.high) == pytest.approx((0.002 - 2.13185 * error, 0.002 + 2.13185 * error), rel=1e-4)
    assert found.detectable == pytest.approx((2.13185 + 0.94096) * error, rel=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        equivalence([0.1])


class Given(Trainings):
    """Trainings whose accuracies are given: of the reference 0.8 and 0.9, of the subject these differences."""

    def __init__(self, differences: Sequence[float]) -> None:
        super().__init__(load_digits())
        self.differences = differences

    def of(self, subject: Subject, seed: int) -> Run:
        run = Run([], [], None, self.data)
        more = 0.0 if subject is self.reference else self.differences[seed]
        run.__dict__["accuracies"] = Accuracies(0.7, 0.9 + more, 0.8 + more)
        return run


@pytest.mark.parametrize(
    ("differences", "status"),
    [
        ([0.001, -0.001, 0.002, 0.0, -0.002], "pass"),
        ([-0.011, -0.009, -0.012, -0.01, -0.01], "fail"),  # a point worse
        ([0.03, -0.03, 0.02, -0.02, 0.0], "fail"),  # no difference on average, but nothing shown either
        ([math.nan, 0.0, 0.0, 0.0, 0.0], "fail"),
        ([0.0, 0.0, 0.0, 0.0], "not run"),  # four seeds
    ],
)
def test_outcome(differences: list[float], status: str) -> None:
    verdict = outcome(Subject("given", dense_losses()), Given(differences), len(differences))
    assert verdict.status == status
    assert status != "pass" or verdict.notes["1-shot"]["mean"] == pytest.approx(0)


def test_outcome_of_real_trainings() -> None:
    """The accuracies come from the trained networks: the reference against itself differs by nothing, the controls by little."""
    whole = Trainings(load_digits(), epochs=1)
    verdict = outcome(whole.reference, whole, 5)
    passes(verdict, whole=True)
    assert verdict.notes["linear"]["differences"] == [0.0] * 5 and min(verdict.notes["linear"]["reference"]) > 0.5
    for control in whole.controls:
        passes(outcome(control, whole, 5), whole=True)
    checks = {check.name: check for check in free_run(whole.reference, whole, 2).checks}
    assert checks["steps 1-5"].measured == 0


def test_checks() -> None:
    assert Check("", 1.0, 1.0).passed and not Check("", 1.1, 1.0).passed and not Check("", math.nan, 1.0).passed
    assert worst([Check("a", 0.9, 1.0), Check("b", math.nan, 1.0), Check("c", 5.0, 1.0)]).name == "b"
    assert Check("", 0.0, 0.0).used == 0 and Check("", 1e-9, 0.0).used == math.inf
    assert Verdict("g", "s").status == "not run" and Report({}, [Verdict("g", "s")]).status == "not run"


# The command ----------------------------------------------------------------------------------------------------------------------------


def test_command_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(validate.QUICK, pairs=9, large=70, scenes=("simclr",), steps=6, checkpoints=3, stop_after=2, seeds=1)
    monkeypatch.setattr(validate, "QUICK", small)
    monkeypatch.setattr(validate, "set_numerics", lambda options: None)  # of the whole process
    assert validate.main(["--quick", "--backend", "torch", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())
    page = (tmp_path / "report.md").read_text()
    assert found["status"] == "pass" and page in printed and (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert [line.split("  ")[0] for line in printed.splitlines()].count("operator") == 3  # the controls and the backend
    assert {verdict["gate"] for verdict in found["verdicts"]} == set(GATES[:-1])
    for left_out in (
        "backend reference: not asked for",
        "backend auto: not asked for",
        "outcome: not asked for",
        "float16: not asked for",
        "replay of moco: not in --quick",
    ):
        assert left_out in found["not_run"] and f"- {left_out}" in page
    for condition in ("versions", "device", "sizes", "order of batches, sha256", "arithmetic", "compiled kernels", "time taken"):
        assert f"- {condition}: " in page
    assert "- tested fastnce: the checkout of this script" in page
    # The legend explains the subjects that are there.
    assert "- noise control: the reference with its rows in another order" in page and "- auto: " not in page
    assert "simclr " in found["conditions"]["order of batches, sha256"]
    assert "noise control" in page and "fastnce" in found["conditions"]["versions"]


def test_command_fails_with_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "fused_losses", lambda name: tiled("no scale"))
    monkeypatch.setattr(validate, "set_numerics", lambda options: None)
    assert validate.main(["--backend", "torch", "--gate", "formula", "--dtype", "float32", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Validation: fail") and "## Failed checks" in page and "| torch | **fail**" in page
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "fail"
    assert "outcome: not asked for" in capsys.readouterr().out


@pytest.mark.parametrize("gate", ["formula", "operator", "replay", "free-run"])
def test_a_loss_that_raises_fails_and_is_reported(
    gate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, of more than two rows: the command asks with two whether a backend runs at all."""
    calls = []

    def raising(z0: Tensor, z1: Tensor, temperature: float = 0.5) -> Tensor:
        calls.extend([0] if len(z0) > 2 else [])
        if len(calls) == 2:
            raise RuntimeError("out of paper")
        return losses.nt_xent(z0, z1, temperature).mean()

    small = replace(validate.QUICK, pairs=9, large=20, wide=9, scenes=("simclr",), steps=3, checkpoints=3, stop_after=1, seeds=1)
    monkeypatch.setattr(validate, "QUICK", small)
    monkeypatch.setattr(validate, "fused_losses", lambda name: dense_losses().but(nt_xent=raising))
    monkeypatch.setattr(validate, "set_numerics", lambda options: None)
    assert validate.main(["--quick", "--backend", "torch", "--gate", gate, "--dtype", "float32", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    failed = [check for verdict in found["verdicts"] for check in verdict["checks"] if not check["passed"]]
    assert found["status"] == "fail" and failed and all("raised RuntimeError: out of paper" in check["where"] for check in failed)
    assert "raised RuntimeError: out of paper" in (tmp_path / "report.md").read_text()


def test_a_gate_that_breaks_fails_and_the_others_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*anything: object) -> Verdict:
        raise OSError("no gate here")

    monkeypatch.setattr(validate, "operator", broken)
    monkeypatch.setattr(validate, "set_numerics", lambda options: None)
    arguments = ["--backend", "torch", "--gate", "formula", "operator", "--dtype", "float32", "--out", str(tmp_path)]
    assert validate.main(arguments) == 1
    page = (tmp_path / "report.md").read_text()
    assert "raised OSError: no gate here" in page and "| torch | pass" in page and (tmp_path / "report.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU there: its interpreter is not in use")
def test_what_does_not_run_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton has no float64 for the formula gate, and its interpreter is too slow for trainings."""
    monkeypatch.setattr(validate, "set_numerics", lambda options: None)
    arguments = ["--backend", "triton", "--dtype", "float32", "bfloat16", "--gate", "formula", "free-run", "--out", str(tmp_path)]
    assert validate.main(arguments) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert {(v["gate"], v["subject"]): v["status"] for v in found["verdicts"]} == {
        ("formula", "reference losses"): "pass",
        ("formula", "triton"): "not run",
        ("free run", "triton float32"): "not run",
    }
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Validation: not run") and found["status"] == "not run"
    assert "| triton | not run |" in page and "- formula, triton: everything: " in page and "float64" in page
    assert "- free run, triton float32: everything: Triton's interpreter is too slow" in page
    assert "- triton bfloat16: Triton's interpreter truncates float32 to bfloat16" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "abacus"], "argument --backend: 'abacus' cannot be used on cpu"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--gate", "iron"], "argument --gate: invalid choice: 'iron'"),
        (["--seeds", "0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["--gate", "outcome", "--seeds", "4"], "argument --seeds: outcome needs at least 5, not 4"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used"),
        (["--installed"], "argument --installed: fastnce is imported from "),
        (["--threads", "none"], "argument --threads: 'none' is not a whole number of at least 1"),
    ],
)
def test_bad_options_exit_2(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        validate.main([*arguments, "--out", str(tmp_path / "new")])
    assert exited.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_out_that_cannot_be_a_folder_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exited:
        validate.main(["--out", str(tmp_path / "file" / "folder")])
    assert exited.value.code == 2 and "argument --out: cannot make the folder" in capsys.readouterr().err


def test_runs_as_a_file() -> None:
    """As the documentation says, from the root and without an installation of train_ref."""
    done = subprocess.run([sys.executable, "train_ref/validate.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--quick" in done.stdout


def test_figure_of_failures_and_gaps(tmp_path: Path) -> None:
    """nan and infinite shares have a place; gates without checks say so."""
    failed = Verdict("operator", "cpu float32", [Check("nan", math.nan, 1.0), Check("far", 1e9, 1.0)])
    report = Report({}, [failed, Verdict("replay", "cpu float16", not_run=["everything: no limits are set for this dtype"])])
    save_figure(tmp_path / "report.png", report)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    page = markdown(report)
    assert "**fail**" in page and "replay, cpu float16: everything" in page
    assert json.loads(json.dumps(report.fields(), allow_nan=False))["verdicts"][0]["checks"][0]["measured"] is None


# The documentation ----------------------------------------------------------------------------------------------------------------------


def test_documentation_lists_every_fault_and_its_gate() -> None:
    text = (ROOT / "docs" / "validation.md").read_text()
    assert f"{len(MUTANTS)} faults" in text and f"{len(list(cases.cases()))} calls" in text
    columns = ("formula", "operator", "replay")
    for mutant in MUTANTS:
        start = f"| {mutant.says} | {dtype_name(mutant.dtype)} |"
        (line,) = [line for line in text.splitlines() if line.startswith(start)]
        cells = [cell.strip() for cell in line.removeprefix(start).strip("|").split("|")]
        assert cells[columns.index(mutant.gate)] == "**caught**" and "".join(cells).count("**") == 2
