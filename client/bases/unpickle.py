"""Turn pickled weights into safetensors, in a process of its own that is given nothing to reach.

This file is run by its path, `python -I unpickle.py OUT FILE...`, and imports nothing of privet. `weights_only` lets
PyTorch build tensors and plain containers only. Should that fail, the process has no network: an audit hook refuses
sockets, other programs, foreign libraries, and files that are opened for writing elsewhere; the parent adds a network
namespace of its own where the system grants one. Limits bound its memory, its time and the files that it writes.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

_REFUSED = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.kill",
            "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
            "ctypes.dlopen", "pty.", "shutil.", "webbrowser.", "urllib.", "ftplib.", "smtplib.")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FACTOR, _SPARE = 4, 8 * 2**30
"""Address space that the process may use: four times the file, and what PyTorch takes for itself, in bytes."""
_SECONDS = 3600


def _guard(out: Path) -> None:
    inside = os.fspath(out) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is refused while pickled weights are read")
        if event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            writes = bool((flags or 0) & _WRITING) if isinstance(flags, int) else bool(set(str(mode)) & set("wax+"))
            if writes and not (isinstance(path, str) and os.path.realpath(path).startswith(inside)):
                raise PermissionError("writing outside the new directory is refused while pickled weights are read")

    sys.addaudithook(hook)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + 2**20, 2 * size + 2**20))
    most = _FACTOR * size + _SPARE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(out: Path, files: list[Path]) -> None:
    """Write each file's tensors into `out`, as safetensors of the same stem."""
    import torch
    from safetensors.torch import save_file

    _limit(max(file.stat().st_size for file in files))
    _guard(out.resolve())
    for file in files:
        loaded = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 - here alone
        if isinstance(loaded, dict) and set(loaded) & {"state_dict", "model"} and len(loaded) <= 3:
            loaded = loaded.get("state_dict", loaded.get("model"))
        if not isinstance(loaded, dict) or not loaded:
            raise ValueError("it holds no table of tensors")
        tensors: dict[str, Any] = {}
        for name in sorted(loaded, key=str):
            if not isinstance(name, str) or not isinstance(loaded[name], torch.Tensor):
                raise ValueError("it holds something else than tensors by name")
            # A copy of its own: tensors that share memory are told apart by the caller, by their bytes.
            tensors[name] = loaded[name].detach().clone().contiguous()
        save_file(tensors, out / f"{file.stem}.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except Exception as error:
        # One line, which the parent quotes.
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
        sys.exit(1)
