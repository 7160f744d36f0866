"""The documentation says what is so: every metric, every link, code that compiles, examples that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import pytest
import torch

import gradiometer
from gradiometer.metrics import CATALOGUE, PUSHED, Metric
from gradiometer.policy.spec import load_policy

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)


def metrics_page() -> str:
    """Write the page of metrics from the catalogue."""
    lines = [
        "# Metrics",
        "",
        "Written from `gradiometer/metrics/` by `make golden`. The scrape adds `job` and `instance`; samples have no",
        "timestamps. A gauge whose value is not known is left out; a counter is there from the start, at 0, so that",
        "`increase` sees its first count. Only `gradiometer_nonfinite_origin_total` is born with it, as most layers",
        "never have one: where you ask for `increase(x[10m])`, ask for `x unless x offset 10m` too.",
        "",
        "| metric | type | labels | what |",
        "|---|---|---|---|",
    ]
    pushed = [
        "",
        "## Pushed",
        "",
        "What [remote write](remote-write.md) sends: a sample a step, with the step's own timestamp, and the labels of",
        "the receiver's settings. No name is scraped as well.",
        "",
        *lines[-2:],
    ]
    scraped = (_row(metric) for metric in CATALOGUE.values())
    return "\n".join([*lines, *scraped, *pushed, *(_row(metric) for metric in PUSHED.values()), ""])


def _row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |"


def test_the_page_of_metrics_is_the_catalogue(request: pytest.FixtureRequest) -> None:
    """docs/metrics.md lists every metric that is scraped, every one that is pushed, and no other."""
    page = ROOT / "docs" / "metrics.md"
    if request.config.getoption("--update-golden"):
        page.write_text(metrics_page())
    assert page.read_text() == metrics_page()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that is there."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_code_blocks_compile(page: Path) -> None:
    """Every block of Python parses, and every block of YAML that is a policy is a valid one."""
    for language, code in re.findall(r"```(python|yaml)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            compile(code.replace("…", "..."), str(page), "exec")
        elif "pipeline:" in code:
            assert load_policy(_loaded(code)).pipeline


def _loaded(code: str) -> dict[str, object]:
    import yaml

    loaded: dict[str, object] = yaml.safe_load(code)
    return loaded


def test_the_checkpoint_recipe_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil) -> None:
    """The recipe of the page of actions, run as it stands, saves a checkpoint after a spike and at no other time."""
    page = (ROOT / "docs" / "actions.md").read_text()
    (recipe,) = re.findall(r"```python\n(import threading.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIOMETER_DIR", str(tmp_path / "runs"))
    model = torch.nn.Linear(2, 1)

    def compute_loss(model: torch.nn.Module, step: int) -> torch.Tensor:
        if step == 119:  # of any size: the callback has had the time to ask before the loop looks
            wait_until(lambda: scope["wanted"].is_set())
        loss: torch.Tensor = model(torch.ones(1, 2)).sum() * (1000.0 if step == 110 else 1.0)
        return loss

    scope: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)}
    scope |= {"steps": 240, "compute_loss": compute_loss}
    exec(recipe, scope)
    (saved,) = tmp_path.glob("*.pt")
    assert saved.stem == "step119"
    assert torch.load(saved).keys() == {"model", "optimizer", "agent"}


def test_the_example_loop_runs(tmp_path: Path) -> None:
    """examples/plain_loop.py trains under examples/policy.yaml and leaves the run it prints."""
    done = subprocess.run(
        [sys.executable, "examples/plain_loop.py", "--steps", "20", "--policy", "examples/policy.yaml"],
        cwd=ROOT,
        env={**os.environ, "GRADIOMETER_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (recorded,) = tmp_path.iterdir()
    assert recorded.name in done.stdout
    run = gradiometer.open_run(recorded)
    assert len(run) == 20
    assert run.loss[-1] < run.loss[0]


def test_the_recipe_for_checkpoints_runs(tmp_path: Path) -> None:
    """The loop of docs/checkpoints.md saves what it restores, and Accelerate does with the lines given."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    recipe, accelerated, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    policy: list[dict[str, Any]] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 1.0}}]
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradiometer.attach(model, optimizer, policy=policy, dir=tmp_path, ring_bytes=2**20) as agent:
        scope: dict[str, Any] = {"model": model, "optimizer": optimizer, "agent": agent}
        exec(recipe, scope)
        _bad_step(model, optimizer)
        scope["save"](tmp_path / "last.pt", 1)
        _bad_step(model, optimizer)
        assert scope["resume"](tmp_path / "last.pt") == agent.step == 1
        assert agent.state_dict()["states"]["nonfinite"]["consecutive"] == 1
        accelerator = accelerate.Accelerator(cpu=True)
        register, save, load = accelerated.splitlines()
        names = {"accelerator": accelerator, "agent": agent, "path": str(tmp_path / "state")}
        exec(f"{register}\n{save}", names)
        _bad_step(model, optimizer)
        exec(load, names)
        assert agent.step == 1
        assert agent.state_dict()["states"]["nonfinite"]["consecutive"] == 1


def _bad_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
