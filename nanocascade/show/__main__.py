"""One page that shows a run or a whole cascade: scores, curves, and every token of its rollouts.

    python -m nanocascade.show runs/out                      writes runs/out/page.html
    python -m nanocascade.show runs/out/if_rl --watch        rewrites it while the run goes on

The page is one file that loads nothing else: it opens from the disk, without a network.
"""

import base64
import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanocascade.cli import parse_args, run_main
from nanocascade.files import read_text, write_text_atomic
from nanocascade.run.read import is_finished
from nanocascade.show.read import read_page

WATCH_SECONDS = 5


@dataclass
class Config:
    out: str = ""  # file to write (default: page.html in the run's or cascade's directory)
    watch: bool = False  # rewrite the page every 5 seconds until the run is finished, or Ctrl-C


def main(argv: list[str]) -> None:
    if "--help" not in argv and (not argv or argv[0].startswith("--")):
        raise ValueError("usage: python -m nanocascade.show RUN_OR_CASCADE [--out FILE] [--watch]")
    (cfg,) = parse_args(Config, argv=argv[argv[:1] != ["--help"] :])
    path = Path(argv[0])
    out = Path(cfg.out) if cfg.out else path / "page.html"
    try:
        while cfg.watch and not is_finished(path):
            write_page(path, out, WATCH_SECONDS)
            print(f"\r{out} written at {time.strftime('%H:%M:%S')}", end="", flush=True)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        print()
    write_page(path, out)
    print(f"written: {out} ({out.stat().st_size / 2**20:.1f} MiB)")


def write_page(path: Path, out: Path, watch: int = 0) -> None:
    """Replace `out` in one step, so that a browser never reads half a page. With `watch` the page
    reloads itself every so many seconds."""
    page = read_page(path) | {"watch": watch, "made": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_text_atomic(out, render_page(page))


def render_page(page: dict) -> str:
    """The template with the data in it.

    Model text stands only in a JSON block in which `<` is escaped, and the script shows it through
    textContent. The content security policy permits the template's own script and style, by their
    hashes, and nothing else: no other script, no request, no form.
    """
    template = read_text(Path(__file__).with_name("template.html"))
    hashes = {}
    for tag in ("style", "script"):
        body = re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1]
        digest = hashlib.sha256(body.encode()).digest()
        hashes[tag] = f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"
    policy = f"default-src 'none'; {hashes['script']}; {hashes['style']}; base-uri 'none'"
    policy += "; form-action 'none'"
    data = json.dumps(page, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, _, after = template.replace("{{POLICY}}", policy).partition("{{DATA}}")
    return before + data + after


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
