"""Run the page's modules in node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from openwu.export.embedded.onnx import PAGE


def node(folder: Path, code: str, given: object) -> Any:
    """What a module prints as JSON; it finds the page's modules beside it and its argument in `given`."""
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
    start = 'import fs from "node:fs";\nconst given = JSON.parse(fs.readFileSync("given.json", "utf-8"));\n'
    (folder / "run.mjs").write_text(start + code, encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
