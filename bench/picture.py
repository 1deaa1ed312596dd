"""Pictures of a page of `python -m nanocascade.show`, taken in a headless Chromium.

    python -m bench.picture runs/out/page.html docs/images

writes cascade.png (the page's top), and a group of rollouts of RL (advantage.png) and of MOPD
(teacher.png). Debian: apt-get install -y chromium.
"""

import sys
import tempfile
from pathlib import Path

from bench.browser import Browser

WIDTH, SCALE = 1200, 1.5  # CSS pixels, and image pixels in one of them
# name: (section of the page, state of the page, most CSS pixels of its height)
PICTURES = {
    "cascade": (0, "", 1200),
    "advantage": (2, "stage=multi_domain_rl&domain=tools&reward=differ", 900),
    "teacher": (2, "stage=mopd&domain=math&reward=0+or+less", 700),
}


def take(page: Path, out: Path, name: str) -> None:
    section, state, most = PICTURES[name]
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # helpers may still write
    with folder as profile, Browser(profile, WIDTH, 900) as browser:
        browser.open(page.resolve(), f"#{state}")
        box = f"document.querySelectorAll('section')[{section}].getBoundingClientRect()"
        height = int(browser.run(f"{box}.bottom - {box}.top * {int(section > 0)}")) + 10
        browser.resize(WIDTH, min(height, most), SCALE)
        browser.run(f"scrollTo(0, {section and f'{box}.top + scrollY'})")
        browser.run("new Promise((done) => setTimeout(done, 300))")
        browser.picture(out / f"{name}.png")


if __name__ == "__main__":
    page, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        take(page, out, name)
