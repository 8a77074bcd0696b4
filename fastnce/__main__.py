"""`python -m fastnce`: versions, device, every backend and the reasons against it, the one that "auto" takes, and a self-test.

`python -m fastnce check` puts the GPU backends to their proof ahead of the first use: some 570 variants of the kernels, minutes.
`python -m fastnce build-cpu` compiles the kernels of backend="cpu" into the user's cache: seconds, a C++ compiler and ninja.
`python -m fastnce build-cuda` compiles the CUDA kernels there: minutes, and nvcc too; no GPU. --arch chooses what for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnce import __version__, backends, files, selftest
from fastnce.backends import proof, verdicts
from fastnce.compiled import build, find
from fastnce.pairs import Pairs
from fastnce.problem import Problem

COMMANDS = {f"build-{kind}": kind for kind in find.KINDS}


def report() -> dict[str, Any]:
    """All that this command prints, ready for JSON."""
    compiled = {kind: _compiled(kind) for kind in find.KINDS}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = [_backend(name, device) for device in devices for name in backends.BACKENDS]
    tests = [_self_test(row["name"], row["device"]) for row in found if row["available"]]
    return {
        "versions": {
            "fastnce": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
        },
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if "cuda" in devices else [],
        "cores": os.cpu_count(),
        "backends": found,
        "compiled": compiled,
        "auto": {device: _auto(device) for device in ("cpu", "cuda")},
        "self_test": {"limit": selftest.LIMIT, "ok": all(test["ok"] for test in tests), "runs": tests},
    }


def _problem(device: str) -> Problem:
    """The smallest problem there is: a backend that objects to it objects to every problem on this device."""
    q, k = torch.ones(2, 1, 1, device=device)
    return Problem(q, k, torch.ones((), device=device), None, Pairs(offset=0), two_sided=False, normalize=True)


def _backend(name: str, device: str) -> dict[str, Any]:
    reasons = backends.BACKENDS[name].unsupported(_problem(device))
    return {"name": name, "device": device, "available": not reasons, "reasons": reasons}


def _auto(device: str) -> str | None:
    """Of CUDA also where there is none: a fake tensor has no values, and a backend is chosen without reading any."""
    with FakeTensorMode():
        try:
            return backends.pick("report", "auto", _problem(device))
        except NotImplementedError:
            return None
        except ValueError as error:  # FASTNCE_BACKEND
            raise files.Stopped(str(error)) from None


def _self_test(name: str, device: str) -> dict[str, Any]:
    results = selftest.run(name, device)
    return {
        "backend": name,
        "device": device,
        "ok": all(result.ok for result in results),
        "seconds": sum(result.seconds for result in results),
        "losses": [result._asdict() for result in results],
    }


def _compiled(kind: str) -> str:
    """The state of a library in one line: the level that runs; or the reason why none does; or its use and the tools to build it with."""
    reason = _objection(kind)
    if reason is None:
        aside = find.left_aside(kind)
        return find.level(kind) + (f" (left aside: {aside})" if aside else "")
    return f"{reason}: {build.BRINGS[kind]}; {build.tool(kind)}" if reason == find.not_built(kind) else reason


def _objection(kind: str) -> str | None:
    """find.objection without its warning, because this command prints the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return find.objection(kind)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["   ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())]
    lines.append("device     " + (", ".join(found["gpus"]) or f"none (CPU, {found['cores']} cores)"))
    lines.append("backends")
    for row in found["backends"]:
        lines.append(f"  {_where(row['name'], row['device'])}{'yes' if row['available'] else 'no    ' + '; '.join(row['reasons'])}")
    for kind, state in found["compiled"].items():
        lines.append(f"  compiled kernels of {kind}: {state}")
    for device, name in found["auto"].items():
        lines.append(f"auto uses  {name or 'nothing'} for {device} tensors")
    limit = found["self_test"]["limit"]
    lines.append(f"self-test: largest relative error of float32 values and gradients against float64 (limit {limit:g})")
    lines.append(" " * 22 + "".join(f"{loss:>11}" for loss in selftest.CASES))
    for run in found["self_test"]["runs"]:
        errors = "".join(f"{'-' if loss['error'] is None else format(loss['error'], '.1e'):>11}" for loss in run["losses"])
        lines.append(f"  {_where(run['backend'], run['device'])}{errors}   {'ok' if run['ok'] else 'FAILED'}   {run['seconds']:.2f} s")
        lines += [f"    {loss['loss']}: {loss['problem']}" for loss in run["losses"] if not loss["ok"]]
    return "\n".join(lines)


def _where(name: str, device: str) -> str:
    return f"{name:<11}on {device:<6}"


def _build(kind: str, arguments: Sequence[str]) -> int:
    """Compile a library and load it; 1 where that fails."""
    parser = argparse.ArgumentParser(prog=f"python -m fastnce build-{kind}", description=f"Compile csrc/{kind}.", allow_abbrev=False)
    if kind == "cuda":
        known = ",".join(build.ARCHS)
        parser.add_argument("--arch", help=f"what to compile for, several after commas; by default all there are: {known}")
    options = vars(parser.parse_args(arguments))
    try:
        print(build.build(kind, archs=options["arch"].split(",") if options.get("arch") is not None else ()))
    except (build.BuildError, OSError) as error:
        print(f"fastnce build-{kind}: {error}", file=sys.stderr)
        return 1
    if reason := _objection(kind):
        print(f"fastnce build-{kind}: {reason}", file=sys.stderr)
        return 1
    return 0


def _check(arguments: Sequence[str]) -> int:
    """Put the GPU backends to the proof, and print a line for each variant; 1 where one is wrong."""
    description = "Check the GPU backends against torch's own operations, variant by variant, and record the verdicts."
    argparse.ArgumentParser(prog="python -m fastnce check", description=description, allow_abbrev=False).parse_args(arguments)
    seen = wrong = 0
    for device in verdicts.devices():
        print(f"{verdicts.describe(device)}\n{'verdict':<9}{'seconds':>8}  variant")
        for name in backends.PROVEN:
            if reasons := backends.BACKENDS[name].unsupported(_problem(str(device))):
                print(f"{'no':<9}{'':>8}  {name}: {'; '.join(reasons)}")
                continue
            for variant, columns in proof.ahead(losses=hasattr(backends.BACKENDS[name], "loss")):
                found = verdicts.check(name, device, columns, variant)
                seen, wrong = seen + 1, wrong + bool(found.why)
                why = f"\n{'':>19}{found.why}" if found.why else ""
                print(f"{'WRONG' if found.why else 'right':<9}{found.seconds:>8.2f}  {name}: {variant}{why}", flush=True)
    if not seen:
        raise files.Stopped("check: nothing was checked: no backend for GPUs runs here (python -m fastnce says why)")
    print(f"{seen} variants checked, {wrong} wrong")
    return 1 if wrong else 0


@files.command("python -m fastnce")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, check the GPU backends, or build a library; 1 where a test failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] == "check":
        return _check(given[1:])
    if given and given[0] in COMMANDS:
        return _build(COMMANDS[given[0]], given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m fastnce",
        usage="\n       ".join(f"%(prog)s {rest}" for rest in ("[--json]", "check", "build-cpu", "build-cuda [options]")),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(given)
    found = report()
    print(json.dumps(found, indent=2, allow_nan=False) if options.json else text(found))
    return 0 if found["self_test"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
