"""Downloads an npm package with the npm client of this machine, and unpacks it."""

import json
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

from emma_train.errors import UserError

DRAWINGS = "fluentui-emoji@1.3.0"
UNICODE_TABLE = "unicode-emoji-json@0.9.0"


def fetch_package(spec: str, into: Path) -> Path:
    """Download `name@version` and unpack it; returns the unpacked folder. UserError if npm is missing or fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is not installed, so {spec} cannot be fetched; install Node.js, "
            "or give unpacked packages with --package and --unicode-table"
        )
    into.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", spec, "--json", "--pack-destination", str(into)]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(
            f"npm pack {spec} failed ({reason}); check the network, "
            "or give unpacked packages with --package and --unicode-table"
        )
    name = spec.partition("@")[0]
    return unpack(into / json.loads(done.stdout)[0]["filename"], into / name)


def unpack(archive: Path, into: Path) -> Path:
    """Unpack the .tgz of a package; returns the package's folder. Raises UserError where it is none."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(into, filter="data")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive}: not a readable .tgz of a package ({' '.join(str(error).split())})") from None
    return into / "package"
