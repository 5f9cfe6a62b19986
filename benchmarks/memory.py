"""How much memory this process takes. No imports beyond the standard library: every engine's process uses it."""

import resource
import sys
from pathlib import Path

MIB = 1024 * 1024


def memory_bytes() -> tuple[int, int]:
    """(resident, peak resident) bytes of this process.

    Linux counts them for this program alone. The portable figure of `getrusage`, which stands in elsewhere, also
    covers what the process was before it became this program, and has no value for now but the peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        kib = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith("Vm")}
        return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak
