"""Execute one notebook in a fresh kernel of this very interpreter, and say clearly where it failed."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightmedvlm_utils.files import outputs_root

_SOURCE_LINES_SHOWN = 3
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(Exception):
    """A notebook stopped; the message says in which cell, with which error, and where its copy and log lie.

    `expected` is true where the cell raised a UserError: a sentence for the user, not a defect. `exit_code` is what the
    command line ends with: 2 for such a sentence, 143 where SIGTERM has ended the run, 1 for a defect.
    """

    def __init__(self, message: str, expected: bool = False, terminated: bool = False):
        super().__init__(message)
        self.expected = expected or terminated
        self.exit_code = 143 if terminated else 2 if expected else 1


@dataclass
class Execution:
    """What one executed notebook cost."""

    seconds: float
    peak_memory_mb: float  # resident memory of the kernel and its worker processes, summed


def execute(source: Path, output: Path, log: Path, parameters: dict) -> Execution:
    """Run `source` from its own folder with `parameters`; write the executed copy and the kernel's output.

    The copy is saved after every cell, so that it shows how far a failed run came. Raises NotebookFailed.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # NotebookFailed says it, once
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log.write_text("", encoding="utf-8")
    # Appending, since papermill and the kernel's own processes write to the same file.
    with log.open("a", encoding="utf-8") as stream, _Descendants() as descendants:
        try:
            papermill.execute_notebook(
                source.resolve(),
                output.resolve(),
                parameters,
                kernel_name="python3",
                language="python",
                cwd=source.parent.resolve(),
                progress_bar=False,
                stdout_file=stream,
                stderr_file=stream,
                kernel_manager_class=_kernel_manager(stream, descendants),
            )
        except papermill.PapermillExecutionError as error:
            known = error.ename == "UserError"
            raise NotebookFailed(_describe(error, source, output, log), known, descendants.told) from error
        except DeadKernelError as error:
            if descendants.told:
                raise NotebookFailed(f"{source.stem} was told to stop (SIGTERM).", terminated=True) from error
            raise NotebookFailed(
                f"{source.stem} stopped: its kernel was killed, most often for want of memory."
                f"\n  executed so far: {output}\n  log: {log}"
            ) from error
        except OSError as error:  # a full disk: half a notebook helps nobody
            output.unlink(missing_ok=True)
            error.filename = error.filename or str(output)
            raise
    return Execution(round(time.monotonic() - started, 1), round(descendants.peak / 2**20, 1))


def _kernel_manager(log_stream, descendants: _Descendants):
    """A kernel manager class that starts `sys.executable`, whatever kernelspecs are installed on the machine,
    and keeps what the kernel's process prints. While a kernel lives, SIGTERM goes on to it."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class SameInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python", env=_environment())

        async def _async_launch_kernel(self, kernel_cmd, **options):
            await super()._async_launch_kernel(kernel_cmd, **options, stdout=log_stream, stderr=log_stream)
            descendants.listen(asyncio.get_running_loop())

    return SameInterpreter


def _environment() -> dict[str, str]:
    """Variables that make the kernel use this package, this outputs folder and a headless display."""
    package_parent = str(Path(__file__).resolve().parents[2])
    search_path = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(search_path),
        "LIGHTMEDVLM_OUTPUTS": str(outputs_root()),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_MININTERVAL": "10",  # a bar that moves ten times a second floods the executed copy
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


class _Descendants:
    """The processes that start while it is open: watches their memory, and leaves none behind (Ctrl-C)."""

    def __init__(self, interval: float = 0.5):
        self.peak = 0  # bytes
        self.told = False  # whether they were asked to end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Descendants:
        self._before = self._all()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._loop is not None and not self._loop.is_closed():  # it is used again for the next notebook
            self._loop.remove_signal_handler(signal.SIGTERM)
        self._stop.set()
        self._thread.join()
        left = self._all() - self._before
        for process in left:
            with suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(left, timeout=5)[1]:
            with suppress(psutil.Error):
                process.kill()

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass SIGTERM on from now until closed. nbclient's own handler would end the kernel before a training could
        save its state."""
        with suppress(NotImplementedError, RuntimeError):  # Windows; a thread beside the main one
            loop.add_signal_handler(signal.SIGTERM, self.terminate)
            self._loop = loop

    def terminate(self) -> None:
        """Ask all of them to end (SIGTERM), as we were asked: a training saves its state, all else ends at once."""
        self.told = True
        for process in self._all() - self._before:
            with suppress(psutil.Error):
                process.terminate()

    def _all(self) -> set:
        return set(psutil.Process().children(recursive=True))

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            total = 0
            for process in self._all() - self._before:
                with suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)


def _describe(error, source: Path, output: Path, log: Path) -> str:
    """The failing cell, its first lines, the error, and where to look further."""
    lines = error.source.strip().splitlines()
    shown = lines[:_SOURCE_LINES_SHOWN] + (["..."] if len(lines) > _SOURCE_LINES_SHOWN else [])
    traceback = _ANSI.sub("", "\n".join(error.traceback))
    at = re.search(r"Cell In\[\d+\], line (\d+)", traceback)
    where = f", line {at[1]}" if at else ""
    if at and _SOURCE_LINES_SHOWN < int(at[1]) <= len(lines):
        shown.append(lines[int(at[1]) - 1])
    cause = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
    body = "\n".join(f"    {line}" for line in shown)
    return (
        f"{source.stem} stopped in cell [{error.exec_count}]{where}:\n{body}\n{_ANSI.sub('', cause)}\n"
        f"  executed so far: {output}\n  log: {log}"
    )
