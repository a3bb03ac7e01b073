"""A real sshd for tests, with keys, port and configuration of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Callable

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
# Why there can be none here; "" if there can.
MISSING = "" if SSHD and shutil.which("ssh") else "needs openssh-server and openssh-client"


class Sshd:
    """Serves at ``address`` and ``port`` until ``close``.

    Everybody who has the key in ``folder`` may log in, as the user of this process. ``names`` are
    what its clients call it. ``command`` puts a command into the place where it is to run. What its
    sessions start has ``mark`` in its environment, as ``TEST_MARK``, and ``path`` as its PATH.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        port: int,
        names: list[str],
        command: Callable[[list[str]], list[str]] = lambda c: c,
        path: str = "/usr/local/bin:/usr/bin:/bin",
    ) -> None:
        assert SSHD is not None
        self.folder, self.port, self.mark = folder, port, uuid.uuid4().hex
        for name in ("host_key", "user_key"):
            if not (folder / name).exists():
                keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
                subprocess.run(keygen, check=True)
        key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        lines = [f"{name if port == 22 else f'[{name}]:{port}'} {key}\n" for name in names]
        with (folder / "known_hosts").open("a") as known:
            known.writelines(lines)
        config = folder / f"config-{self.mark}"
        config.write_text(
            f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\n"
            f"SetEnv TEST_MARK={self.mark} PATH={path}\n"
        )
        if os.geteuid() == 0:  # Debian's service makes it otherwise.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._process = subprocess.Popen(
            command([SSHD, "-D", "-e", "-f", str(config)]),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        said = ""
        assert self._process.stderr is not None
        while "Server listening" not in said:
            line = self._process.stderr.readline()
            if not line:
                raise RuntimeError(f"sshd did not start: {said}")
            said += line

    def options(self) -> list[str]:
        """For ``bluefog run``, to get in."""
        values = [
            f"IdentityFile={self.folder}/user_key",
            "IdentitiesOnly=yes",
            f"UserKnownHostsFile={self.folder}/known_hosts",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
        ]
        options = [word for value in values for word in ("--ssh-option", value)]
        return [*options, "-p", str(self.port)]

    def sessions(self) -> list[int]:
        """Processes that its sessions started and that still run."""
        return marked(self.mark)

    def close(self) -> None:
        # A session whose network is gone keeps the pipe open.
        self._process.terminate()
        self._process.wait()
        self._process.stderr.close()


def marked(mark: str) -> list[int]:
    """Processes that have ``mark`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        # Gone meanwhile, or a zombie.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
