"""Take the pictures of docs/live-page.md: a small transformer trains, a monitor watches, Chromium looks at the page.

    pip install 'gradiometer[torch,monitor]' playwright        # and Debian's chromium
    python examples/screenshots.py [FOLDER]                    # default: docs/images

What is shown is real: the model learns the source text of Python's standard library. Three of its batches have a loss
that is scaled up, and one a loss of NaN, so that there is something to see. Beside it ``gradiometer demo`` ran twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor, nn

import gradiometer
from gradiometer.demo import loss_of, read_text, windows

RUN, STEPS, SHOWN = "transformer", 4000, 780
SPIKES, BAD = {260: 40.0, 430: 15.0, 700: 80.0}, 560
POLICY = {
    "pipeline": [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}],
    "shadow": [{"zclip": {}}],
}
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


class Block(nn.Module):
    """Attention and a multi-layer perceptron, each after a norm and with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """A language model over ``symbols`` characters."""

    def __init__(self, symbols: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def train(root: Path) -> None:
    """Train until stopped, with three spikes and a loss of NaN."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    text, generator = read_text(), torch.Generator().manual_seed(0)
    model = Transformer(len(text.vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    warmup = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    with gradiometer.attach(model, optimizer, policy=POLICY, run_id=RUN, dir=root, updates_every=20) as agent:
        for step in range(STEPS):
            loss = loss_of(model, windows(text.train, generator, torch.device("cpu")))
            optimizer.zero_grad()
            (loss * SPIKES.get(step, float("nan") if step == BAD else 1.0)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            agent.log(loss=loss)
            warmup.step()


def take(browser: Browser, url: str, folder: Path) -> None:
    """Take every picture."""
    for name, path, scheme, (width, height) in (
        ("live-list", "", "light", (1280, 330)),
        ("live-run", f"#run={RUN}", "light", (1280, 1840)),
        ("live-run-dark", f"#run={RUN}", "dark", (1280, 1180)),
        ("live-phone", f"#run={RUN}", "light", (390, 1560)),
        ("live-phone-dark", "", "dark", (390, 720)),
    ):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
        )
        page = context.new_page()
        page.goto(f"{url}/{path}")
        page.wait_for_selector(".layers tbody tr" if path else ".runs tbody tr")
        page.wait_for_timeout(1500)
        if name == "live-run":
            point_at_a_spike(page)
        target = folder / f"{name}.png"
        page.screenshot(path=target)
        shrink(target)
        context.close()


def point_at_a_spike(page: Page) -> None:
    """Put the cursor of the picture of layers where the largest norm is."""
    canvas = page.locator(".heat canvas")
    box, label = canvas.bounding_box(), canvas.get_attribute("data-label")
    if box is not None and label is not None:
        share = max(SPIKES) / float(page.locator(".tiles dd").first.inner_text().replace("\u202f", ""))
        page.mouse.move(box["x"] + int(label) + share * (box["width"] - int(label)), box["y"] + 0.4 * box["height"])
        page.wait_for_timeout(300)


def shrink(path: Path) -> None:
    """Write a picture again with a palette: its most frequent colours as they are, and others that cover the rest."""
    from PIL import Image

    with Image.open(path) as image:
        full = image.convert("RGB")
    colours, counts = np.unique(np.asarray(full).reshape(-1, 3), axis=0, return_counts=True)
    frequent = colours[np.argsort(-counts)[:112]].ravel().tolist()
    rest = full.quantize(144, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*frequent, *rest[: 3 * 144]][: 3 * 256])
    full.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root, port_file = Path(temporary) / "runs", Path(temporary) / "port"
        environment = os.environ | {"GRADIOMETER_STATE_DIR": f"{temporary}/state", "OMP_NUM_THREADS": "1"}
        for run_id, policy in (("lstm-clipped", ()), ("lstm-observed", ("--policy", "none"))):
            demo = (sys.executable, "-m", "gradiometer.cli", "demo", "--no-serve", "--steps", "100", "--dir", str(root))
            subprocess.run([*demo, "--run-id", run_id, *policy], check=True, env=environment)
        training = subprocess.Popen([sys.executable, __file__, "--train", str(root)], env=environment)
        command = (sys.executable, "-m", "gradiometer_monitor", "--dir", root, "--port", "0", "--port-file", port_file)
        monitor = subprocess.Popen([str(part) for part in command], env=environment)
        try:
            ring = root / RUN
            while not (ring.exists() and len(gradiometer.open_run(ring)) >= SHOWN):
                time.sleep(1)
            url = f"http://127.0.0.1:{port_file.read_text().strip()}"
            urllib.request.urlopen(f"{url}/-/ready", timeout=30).close()
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
                take(browser, url, folder)
                browser.close()
        finally:
            for process in (training, monitor):
                process.terminate()
                process.wait(timeout=30)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/images"))
