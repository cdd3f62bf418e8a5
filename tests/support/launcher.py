"""DeepSpeed's launcher as the tests start it, and commands without root's rights."""

import os
import socket

# takes from root what lets it read everything; others have nothing to lose
UNPRIVILEGED = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
)


def launcher_of(ranks: int) -> list[str]:
    """Arguments of Python before a script of ``ranks`` processes, on a port that is free.

    The launcher's own is the same for all, and runs beside each other would meet there.
    """
    module = ["-m", "deepspeed.launcher.runner"]
    return [*module, f"--num_accelerators={ranks}", f"--master_port={free_port()}"]


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
