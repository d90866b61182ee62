"""A real SLURM of a few nodes on this machine: slurmctld, and one slurmd for each node in namespaces of its own.

Every node has its own host name, address and processes, so that power and cables can be cut. Nothing is installed
here: Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge must be there, and root.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "munge", "ip", "unshare", "nsenter")
FIRST_PORT = 18000
PATIENCE = 400.0  # seconds that a test waits on a busy machine
# What a node may send: ranks that share a model wait for the cable most of the time, and leave the processors to other
# tests while SLURM takes its time to notice something. A kernel without this queue lets them run on.
SLOW = ("tbf", "rate", "40mbit", "burst", "16kb", "limit", "8mb")

# cred_expire: how long a requeued job waits. Timers: a lost node is found after some 15 s instead of minutes.
SLURM_CONF = """
ClusterName=megaboat
SlurmctldHost={host}({subnet}.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5,ttl=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=1,batch_sched_delay=0,bf_interval=1,bf_yield_sleep=10000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=6
InactiveLimit=0
KillWait=20
UnkillableStepTimeout=60
BatchStartTimeout=10
CompleteWait=0
MessageTimeout=5
TCPTimeout=2
MinJobAge=600
ReturnToService=2
TreeWidth=65533
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=10 DefMemPerCPU=64
PartitionName=low Nodes=ALL MaxTime=1-0 DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
"""


def why_not() -> str | None:
    """What keeps a cluster from starting here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2)"
    if os.geteuid():
        return "needs root, to give each node namespaces of its own"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this kernel or container gives no namespaces"
    return None


class Cluster:
    """Nodes mb1, mb2, ... of 64 pretended CPUs and 8 pretended GPUs; partitions `main`, and `low` that it preempts."""

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 8) -> None:
        self.folder, self.size = folder, nodes
        # Clusters of several test sessions live side by side.
        number = os.getpid() % 250
        self._subnet, self._port, self._tag = f"10.91.{number}", FIRST_PORT + 2 * number, f"mb{number}x"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._nodes: dict[str, subprocess.Popen] = {}
        self._write_files(gpus)

    def start(self) -> None:
        self._network()
        self._call("munged", "--force", *self._munge_files())
        _until(lambda: self._ask("munge", "-n", "-S", str(self.folder / "munge.socket")) != "", 60, "munged")
        self._call("slurmctld", "-i")
        for number in range(1, self.size + 1):
            self.power_on(f"mb{number}")
        _until(lambda: self.idle() == self.size, 60, "idle nodes")

    def clear(self) -> None:
        """End all jobs, and wait for all nodes."""
        self._ask("scancel", "--full", "--user=root")
        _until(lambda: self.idle() == self.size, PATIENCE, "idle nodes")

    def stop(self) -> None:
        self._ask("scancel", "--full", "--user=root")
        for node in list(self._nodes):
            self.power_off(node)
        for name in ("slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        for number in range(1, self.size + 1):
            self._ask("ip", "link", "del", f"{self._tag}{number}")
            self._ask("ip", "netns", "del", f"{self._tag}-mb{number}")
        self._ask("ip", "link", "del", f"{self._tag}br")

    def power_on(self, node: str) -> None:
        """Boot a node: its first process is a shell whose death ends all others of the node."""
        boot = (
            f"hostname {node}; mount --bind {self.folder}/hosts /etc/hosts; "
            f"mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf; "
            f"while :; do [ -e {self._dead(node)} ] || slurmd -D -N {node}; sleep 1; done"
        )
        spaces = ("unshare", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
        with (self.folder / f"node-{node}.log").open("ab") as log:
            self._nodes[node] = subprocess.Popen(
                ["ip", "netns", "exec", f"{self._tag}-{node}", *spaces, "bash", "-c", boot],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def power_off(self, node: str) -> None:
        """End every process of the node at once."""
        process = self._nodes.pop(node)
        process.kill()
        process.wait()

    def kill_slurmd(self, node: str) -> None:
        """End the node's daemon; the jobs on it live on, unseen."""
        self._dead(node).touch()
        words = {b"slurmd", b"-N", node.encode()}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in (path / "environ").read_bytes().split(b"\0")
                if ours and words <= set((path / "cmdline").read_bytes().split(b"\0")):
                    os.kill(int(path.name), signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        self._dead(node).unlink()

    def _dead(self, node: str) -> Path:
        return self.folder / f"{node}.dead"

    def cut(self, node: str) -> None:
        self._call("ip", "link", "set", f"{self._tag}{node.removeprefix('mb')}", "down")

    def mend(self, node: str) -> None:
        self._call("ip", "link", "set", f"{self._tag}{node.removeprefix('mb')}", "up")

    def idle(self) -> int:
        lines = self._ask("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N").split()
        return len(set(lines))

    def sbatch(self, *arguments: str | Path, cwd: Path, **variables: str) -> str:
        """Submit; the job's number."""
        done = self.try_sbatch(*arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def try_sbatch(self, *arguments: str | Path, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *command: str) -> str:
        """A client command's output."""
        return self._call(*command)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self._ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, job: str, states: tuple[str, ...], seconds: float = PATIENCE) -> str:
        """The first of `states` that the job is seen in."""
        over = {*states, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"}
        _until(lambda: self.state(job) in over, seconds, f"job {job} in {states}")
        state = self.state(job)
        assert state in states, f"job {job} is {state}, not {states}"
        return state

    def _call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def _munge_files(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = {option: self.folder / f"munge.{name}" for option, name in names.items()}
        paths["pid-file"] = self.folder / "munged.pid"
        return [f"--{option}={path}" for option, path in paths.items()]

    def _write_files(self, gpus: int) -> None:
        for name in ("state", *(f"spool/mb{number}" for number in range(1, self.size + 1))):
            (self.folder / name).mkdir(parents=True)
        for number in range(gpus):  # only looked at; CUDA_VISIBLE_DEVICES takes the number at the end
            os.mknod(self.folder / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        addresses = {f"mb{number}": f"{self._subnet}.{10 + number}" for number in range(1, self.size + 1)}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} CPUs=64 Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket=64 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN"
            for name, address in addresses.items()
        )
        host = socket.gethostname().split(".")[0]
        places = {
            "host": host,
            "subnet": self._subnet,
            "port": self._port,
            "slurmd_port": self._port + 1,
            "folder": self.folder,
        }
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(nodes=nodes, **places))
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/nvidia[0-{gpus - 1}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _network(self) -> None:
        bridge = f"{self._tag}br"
        self._call("ip", "link", "add", bridge, "type", "bridge")
        self._call("ip", "addr", "add", f"{self._subnet}.1/24", "dev", bridge)
        self._call("ip", "link", "set", bridge, "up")
        for number in range(1, self.size + 1):
            space, cable = f"{self._tag}-mb{number}", f"{self._tag}{number}"
            self._call("ip", "netns", "add", space)
            self._call("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._call("ip", "link", "set", cable, "master", bridge, "up")
            self._call("ip", "-n", space, "addr", "add", f"{self._subnet}.{10 + number}/24", "dev", "eth0")
            self._call("ip", "-n", space, "link", "set", "eth0", "up")
            self._call("ip", "-n", space, "link", "set", "lo", "mtu", "1500", "up")
            for device in ("lo", "eth0"):
                self._ask("ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, "root", *SLOW)


def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.1)


until = _until
