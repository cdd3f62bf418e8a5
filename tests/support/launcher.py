"""DeepSpeed's launcher as the tests start it."""

import socket


def launcher_of(ranks: int) -> list[str]:
    """Arguments of Python before a script of ``ranks`` processes, on a port that is free.

    The launcher's own is the same for all, and runs beside each other would meet there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = ["-m", "deepspeed.launcher.runner"]
    return [*module, f"--num_accelerators={ranks}", f"--master_port={port}"]
