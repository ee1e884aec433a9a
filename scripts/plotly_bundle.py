"""Puts the part of plotly.js that reports need, packed, where they take it from; npm fetches it from its registry.

Usage: scripts/plotly_bundle.py VERSION    (of plotly.js-cartesian-dist-min)
"""

import gzip
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "plotly.js-cartesian-dist-min"
PACKED = Path(__file__).parent.parent / "mechlens" / "runs" / "report" / "templates" / "plotly-cartesian.min.js.gz"


def main(version: str) -> None:
    """Fetches that version and writes its script, packed, and its licence."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{version}"], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            script, licence = (files.extractfile(f"package/{name}") for name in ("plotly-cartesian.min.js", "LICENSE"))
            assert script is not None
            assert licence is not None
            PACKED.write_bytes(gzip.compress(script.read(), compresslevel=9, mtime=0))
            (PACKED.parent / "plotly-LICENSE.txt").write_bytes(licence.read())
    print(f"{PACKED.name}: {PACKED.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
