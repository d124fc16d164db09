"""The opt-in hook that registers the adapter types in programs that never import this package.

It is put into the environment of the running Python, and costs every start of it a look for this package:

    python -m hf_modular.autoload enable
    python -m hf_modular.autoload disable
"""

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Run at the start of every interpreter, so it must cost nothing and survive the package being uninstalled.
_HOOK = 'import importlib.util as u; u.find_spec("hf_modular") and __import__("hf_modular")\n'


def hook_file() -> Path:
    """Where the hook lies when it is enabled."""
    return Path(sysconfig.get_paths()["purelib"]) / "hf_modular_autoload.pth"


def main(arguments: Sequence[str]) -> int:
    """`enable` or `disable` the hook of the running environment; exit code 2 for anything else."""
    if list(arguments) == ["enable"]:
        hook_file().write_text(_HOOK, encoding="utf-8")
        sys.stdout.write(
            f"Enabled: every program of this environment can load hf_modular's adapters ({hook_file()}).\n"
        )
        return 0
    if list(arguments) == ["disable"]:
        hook_file().unlink(missing_ok=True)
        sys.stdout.write("Disabled.\n")
        return 0
    sys.stderr.write("usage: python -m hf_modular.autoload enable|disable\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
