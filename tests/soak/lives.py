"""An experiment run again and again in child processes, to be killed at any moment.

Importing everything takes ten seconds, so children are forked from a server that has done it. In
such a child the stages run one after the other in one process instead of in one each.
"""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "invdiff_pl.cli.lightning",
    "invdiff_pl.modules",
    "invdiff_pl.data.waterbirds",
    "invdiff_pl.data.synthetic.command",
    "invdiff_pl.report.command",
    "invdiff_pl.workflow.run",
    "tensorboard.summary.writer.event_file_writer",
    "torch.utils.tensorboard",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]
_FEW = (
    "--scale.sampling_steps=2",
    "--scale.samples_per_prompt=4",
    "--scale.sampling_batch=4",
    "--evaluation.resolution=32",
    "--experiment.cache_dir=cache",
)
_RENDERED = (*_FEW, "--render.fraction=0.02", "--scale.classifier_steps=4")
_ADAPTER = (
    "--scale.adapter_steps=18",
    "--scale.calibration_samples=12",
    "--scale.calibration_steps=2",
    "--scale.adapter_batch=12",
    "--scale.scoring_batch=16",
)
TRAIN = (*_RENDERED, *_ADAPTER)
PROMPTS = (
    *_FEW,
    *_ADAPTER,
    "--data.per_prompt=24",
    "--generate.model.least_rare=4",
    "--generate.model.most_per_prompt=32",
    "--model.train_without_bias=true",
)
_ARCHITECTURE = {
    "vae_channels": "[8,8]",
    "unet_channels": "[16,16]",
    "attention_levels": "1",
    "heads": "2",
    "text_width": "16",
}
BACKBONE = (
    *_RENDERED,
    "--scale.autoencoder_steps=12",
    "--scale.autoencoder_batch=8",
    "--scale.backbone_steps=18",
    "--scale.backbone_batch=8",
    *(f"--autoencoder.model.architecture.{key}={value}" for key, value in _ARCHITECTURE.items()),
)


def _live(
    words: Sequence[str],
    folder: str,
    log: str,
    file_limit: int | None,
    environment: Mapping[str, str],
) -> None:
    """Run a command in a forked child, as ``python -m invdiff_pl`` would."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY)
    os.chdir(folder)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The server's streams may be seekable files; a pipe needs new ones.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    from invdiff_pl.cli.main import main
    from invdiff_pl.utils import processes

    def in_process(command: Sequence[str], lock: int, *, tied: bool) -> processes.Ended:
        os.environ[processes.LOCKED] = "1"
        return processes.Ended(main(command[command.index("invdiff_pl") + 1 :]))

    processes.call = in_process
    torch.set_num_threads(1)
    sys.argv = ["invdiff_pl", *words]
    status = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass
class Subject:
    """An experiment in a folder of its own.

    Attributes:
        folder: working directory of its lives.
        words: its command line.
        log: what its lives print; outside the folder, whose disk may be full.
        environment: variables of its lives.
        events: what was done to it, by (how, stage).
    """

    folder: Path
    words: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    events: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.folder / "run"

    def start(self, file_limit: int | None = None) -> "multiprocessing.process.BaseProcess":
        """Start a life; what it prints goes through a pipe, which no limit holds up."""
        _SERVER.set_forkserver_preload(_PRELOADED)
        pipe = self.log.with_suffix(".pipe")
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        self._reader = threading.Thread(target=self._drain, args=(pipe,), daemon=True)
        self._reader.start()
        life = _SERVER.Process(
            target=_live,
            args=(self.words, str(self.folder), str(pipe), file_limit, dict(self.environment)),
        )
        life.start()
        return life

    def _drain(self, pipe: Path) -> None:
        with pipe.open("rb") as stream, self.log.open("ab") as log:
            shutil.copyfileobj(stream, log)

    def finish(self) -> None:
        """A life that nobody disturbs; it must succeed."""
        life = self.start()
        life.join(600)
        assert life.exitcode == 0, f"exit status {life.exitcode}: see {self.log}"

    def kill(self, how: signal.Signals, target: str, delay: float) -> bool:
        """A life that is killed so many seconds after a stage has begun.

        Returns:
            whether it still lived then.
        """
        life = self.start()
        begun = self.run / target / "started.json"
        while life.exitcode is None and not begun.exists():
            time.sleep(0.005)
        life.join(delay)
        if life.exitcode is not None:
            assert life.exitcode == 0, f"exit status {life.exitcode}: see {self.log}"
            return False
        stage = self.stage()
        assert life.pid is not None
        os.kill(life.pid, how)
        life.join(120)
        assert life.exitcode is not None, f"{how.name} in stage {stage} did not end the process"
        if life.exitcode == 0:
            return False  # it was at its last breath anyway
        self.events[how.name, stage] += 1
        return True

    def starve(self, file_limit: int) -> bool:
        """A life in which no file may grow beyond so many bytes; it must tell so in one line.

        Returns:
            whether the limit was met.
        """
        before = len(self.log.read_text()) if self.log.exists() else 0
        life = self.start(file_limit)
        life.join(600)
        return self._told(life.exitcode, before, errno.EFBIG, "RLIMIT_FSIZE")

    def fill_disk(self, room: int) -> bool:
        """A life on a disk that has only so many bytes left. The folder is a tmpfs of its own."""
        before = len(self.log.read_text()) if self.log.exists() else 0
        usage = shutil.disk_usage(self.folder)
        resize(self.folder, usage.used + room)
        try:
            life = self.start()
            life.join(600)
        finally:
            resize(self.folder, 1 << 28)
        return self._told(life.exitcode, before, errno.ENOSPC, "disk full")

    def _told(self, status: int | None, before: int, number: int, what: str) -> bool:
        self._reader.join(30)
        if status == 0:
            return False
        said = self.log.read_text()[before:]
        stage = self.stage()
        assert "Traceback" not in said, f"{what} in stage {stage} gave a traceback: see {self.log}"
        assert status is not None
        assert status > 0
        assert "error: " in said
        foreseen = number == errno.ENOSPC and "are free on its disk: make room" in said
        assert foreseen or os.strerror(number) in said, said[-500:]
        self.events[what, stage] += 1
        return True

    def size(self) -> int:
        """Bytes in its folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def stage(self) -> str:
        """The stage that is under way."""
        started = list(self.run.glob("*/started.json"))
        newest = max(started, key=lambda path: path.stat().st_mtime_ns, default=None)
        return "between stages" if newest is None else newest.parent.name


def words_of(plan: str, experiments: Path, backbone: Path, changes: Sequence[str]) -> list[str]:
    """The command line of a plan: ``train``, ``backbone``, or ``prompts``, without a data set."""
    experiment = "prompts" if plan == "prompts" else "waterbirds"
    words = ["--experiment", experiment, "--experiments", str(experiments), "--run-dir", "run"]
    if plan == "backbone":
        return [plan, *words, *changes]
    return ["train", *words, "--backbone", str(backbone), *changes]


def frequent_checkpoints(target: Path) -> Path:
    """A copy of ``experiments/`` that writes checkpoints every few steps."""
    shutil.copytree(REPOSITORY / "experiments", target)
    for path in (target / "stages").glob("*.yaml"):
        text = path.read_text().replace("every_n_train_steps: 100", "every_n_train_steps: 3")
        path.write_text(text)
    return target


def resize(folder: Path, size: int) -> None:
    """Change the size of a mounted tmpfs."""
    options = f"remount,size={size}"
    subprocess.run(["mount", "-o", options, str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Mount a tmpfs on a folder, if this process may."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={1 << 28}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    """Undo :func:`can_mount`."""
    for _ in range(20):
        if subprocess.run(["umount", str(folder)], check=False).returncode == 0:
            return
        time.sleep(0.5)


def disturb(
    subject: Subject, events: int, seconds: Mapping[str, float], size: int, source: random.Random
) -> None:
    """Disturb an experiment at random moments until it is done or has had so many events.

    Args:
        subject: is disturbed.
        events: how often, at most.
        seconds: about how long each of its stages takes.
        size: about how many bytes it writes.
        source: of the moments.
    """
    mounted = os.path.ismount(subject.folder)
    while subject.events.total() < events:
        due = [name for name in seconds if not (subject.run / name / "stage.json").exists()]
        if not due:
            break
        kind = source.choice(["SIGTERM", "SIGKILL", "SIGTERM", "SIGKILL", "limit", "disk"])
        if kind == "disk" and mounted:
            subject.fill_disk(source.randrange(max(10_000, size - subject.size())))
        elif kind in ("limit", "disk"):
            subject.starve(int(2 ** source.uniform(8, 18)))
        else:
            # Mostly the next stage; now and then the one after it.
            target = due[0] if source.random() < 0.85 else due[min(1, len(due) - 1)]
            subject.kill(signal.Signals[kind], target, source.uniform(0, 1.1 * seconds[target]))
