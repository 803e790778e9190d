"""Set-up of every test, and of the kernels that `pytest --nbval` starts: they inherit it."""

import os
import signal
import sys

import matplotlib

os.environ["TQDM_DISABLE"] = "1"  # no progress bar in an output that is compared
os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", ""
)  # stored outputs are a CPU's; set it to test a GPU
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, whatever else there is
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
os.environ.pop("MPLBACKEND", None)  # kernels draw inline...
matplotlib.use("Agg")  # ...and tests draw to memory
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore Ctrl-C


def pytest_terminal_summary(terminalreporter):
    """Print what tests measured: their `record_property("measured", text)`, from every worker."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "measured":
                terminalreporter.write_line(text)
