"""Every recipe of train/ and decode/ runs as it stands, with CPU devices in place of its machines.

Several hosts are two processes with four devices each, told who they are by the variables that
SLURM, Kubernetes and GKE set. All must train and answer as one process does.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gloo
import numpy as np
import pytest
import tiny_pair
import tiny_run
import yaml

from eagle_jax import settings
from eagle_jax.config import TrainConfig
from eagle_jax.text import read_conversations

ROOT = tiny_pair.ROOT
RUN = {
    f"{folder}/recipes/{name}"
    for folder, node in (("train", "gpu_node.sh"), ("decode", "gpu_node.py"))
    for name in ("one_gpu.sh", node, "tpu_slice.sh", "slurm.sbatch", "gke.yaml")
}
STEPS, CHANGES = 4, {"eval_every": 0, "checkpoint_every": 100000}
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_run import target_run
from eagle_jax.settings import override
config = override(target_run(Path({folder!r})), {changes!r})
"""
# As srun does: every task its variables, and the worst status. A job whose file PREEMPT_AT appears
# is preempted: all tasks get SIGTERM.
SRUN = """#!{python}
import os, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("-"):
    del command[0]
count = os.environ["SLURM_NTASKS"]
step = {{**os.environ, "SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_NUM_TASKS": count}}
tasks = [
    subprocess.Popen(command, env={{**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(int(count))
]
awaited = os.environ.get("PREEMPT_AT")
while awaited and not os.path.exists(awaited) and all(task.poll() is None for task in tasks):
    time.sleep(0.02)
for task in tasks if awaited else []:
    task.terminate()
status = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in status))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$REQUEUED"
"""


def free_port(first: int = 0) -> int:
    """A port that nobody listens on: `first` or a higher one, or any."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", first))
                return probe.getsockname()[1]
            except OSError:
                first += 1


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """What recipes call by name: python, and SLURM's own."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in (
        ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
        ("srun", SRUN.format(python=sys.executable)),
        ("scontrol", SCONTROL),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def start(programs):
    """Starts a command on so many devices, with a launcher's variables."""

    def starting(*command: object, devices: int = 4, **variables: object) -> subprocess.Popen:
        environment = {
            **os.environ,
            **{name: str(value) for name, value in variables.items()},
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a job's tasks end with it
        )

    return starting


def finish(*running: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """What the processes printed together, without the CPU collectives' chatter; and to stderr."""
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process, (_, error) in zip(running, said, strict=True):
        assert process.returncode == status, error[-3000:]
    return gloo.silenced("".join(out for out, _ in said)), "".join(error for _, error in said)


def on_tpu_hosts(start, *command: object) -> tuple[str, str]:
    """In two processes that take themselves for hosts of a TPU slice."""
    # Unset, JAX would ask the metadata of the TPU VM for them.
    empty = dict.fromkeys(
        ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"), ""
    )
    slice_of_two = {
        **empty,
        "JAX_FORCE_TPU_INIT": 1,
        "TPU_SKIP_MDS_QUERY": 1,
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "JAX_COORDINATOR_PORT": free_port(),
    }
    return finish(*(start(*command, **slice_of_two, TPU_WORKER_ID=i) for i in range(2)))


def slurm_job() -> dict[str, object]:
    """Variables of a job of two tasks; JAX makes its port of the job's number."""
    return {"SLURM_JOB_ID": free_port(61440 + os.getpid() % 4000) - 61440, "SLURM_NTASKS": 2}


def pod_commands(path: str, shared: Path) -> list[list[str]]:
    """The container's command in every pod of the job, as Kubernetes would expand it."""
    service, job = yaml.safe_load_all((ROOT / path).read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never", "podFailurePolicy is refused with any other"
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    port = free_port()

    def expand(word: str, index: int) -> str:
        word = word.replace("$(JOB_COMPLETION_INDEX)", str(index))
        word = re.sub(rf"\b{name}-0\.{pod['subdomain']}:\d+", f"localhost:{port}", word)
        return word.replace("/shared", str(shared))

    return [
        [expand(word, index) for word in container["command"]]
        for index in range(spec["parallelism"])
    ]


# --- The folders -----------------------------------------------------------------------------


def test_no_recipe_is_untested() -> None:
    found = [path for folder in ("train", "decode") for path in (ROOT / folder).glob("recipes/*")]
    assert {path.relative_to(ROOT).as_posix() for path in found if path.is_file()} == RUN
    assert all(os.access(path, os.X_OK) for path in found if path.suffix == ".sh")


@pytest.mark.parametrize("folder", ["train", "decode"])
def test_slurm_directives(folder) -> None:
    """sbatch reads them before the first command only; JAX wants one task per GPU."""
    script = (ROOT / folder / "recipes/slurm.sbatch").read_text()
    head = re.split(r"^(?!#|$)", script, maxsplit=1, flags=re.MULTILINE)[0]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", head, re.MULTILINE))
    assert script.count("\n#SBATCH") == len(options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "requeue" in options and options["signal"].startswith("TERM@")


# --- train/ ----------------------------------------------------------------------------------


def config(folder: Path, steps: int = STEPS) -> Path:
    """A configuration file; a run of more steps begins with the same ones."""
    folder.mkdir(exist_ok=True)
    tiny_run.target_run(folder)  # text and tokenizer are there before several look for them
    changes = {**CHANGES, "optim.steps": steps, "optim.schedule": "'constant'"}
    words = [f"{name}={value}" for name, value in changes.items()]
    names = {"tests": str(ROOT / "tests"), "folder": str(folder), "changes": words}
    (folder / "config.py").write_text(CONFIG.format(**names))
    return folder / "config.py"


def losses(folder: Path) -> np.ndarray:
    lines = map(json.loads, (folder / "target/metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def expected(start, tmp_path_factory) -> np.ndarray:
    """Losses on one device, by the recipe for it."""
    folder = tmp_path_factory.mktemp("one")
    out, _ = finish(start("train/recipes/one_gpu.sh", config(folder), devices=1))
    assert json.loads(out)["device"] == "1 x cpu"
    found = losses(folder)
    assert len(found) == STEPS
    return found


def check_trained(out: str, folder: Path, expected: np.ndarray) -> None:
    assert json.loads(out)["device"] == "8 x cpu"  # one line: only the first process prints
    np.testing.assert_allclose(losses(folder)[:STEPS], expected, rtol=1e-5)
    assert (folder / "target/export/model.safetensors").is_file()


def test_train_gpu_node(start, expected, tmp_path) -> None:
    out, _ = finish(start("train/recipes/gpu_node.sh", config(tmp_path), devices=8))
    check_trained(out, tmp_path, expected)


def test_a_later_setting_wins(tmp_path) -> None:
    """Recipes say so of their own."""
    assert settings.load(config(tmp_path), ["fsdp=8", "fsdp=2"], kind=TrainConfig).fsdp == 2


def test_train_tpu_slice(start, expected, tmp_path) -> None:
    out, _ = on_tpu_hosts(start, "train/recipes/tpu_slice.sh", config(tmp_path))
    check_trained(out, tmp_path, expected)


def test_train_slurm_is_preempted_and_goes_on(start, expected, tmp_path) -> None:
    """SIGTERM to all: status 143, the job requeued once; the next one goes on and ends."""
    job, requeued = slurm_job(), tmp_path / "requeued"
    script = ("bash", "train/recipes/slurm.sbatch", config(tmp_path, steps=10**6))
    trace = tmp_path / "target/metrics.jsonl"
    _, error = finish(start(*script, **job, REQUEUED=requeued, PREEMPT_AT=trace), status=143)
    assert "SIGTERM: step" in error
    assert requeued.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    done = len(losses(tmp_path))
    steps = max(done + 1, STEPS)
    config(tmp_path, steps)
    out, error = finish(start(*script, **slurm_job(), REQUEUED=requeued))
    assert f"resuming after step {done}\n" in error and len(losses(tmp_path)) == steps
    check_trained(out, tmp_path, expected)
    assert requeued.read_text().count("\n") == 1


def test_train_kubernetes(start, expected, tmp_path) -> None:
    """Explicit flags ask no cluster: JAX's own detection would want Kubernetes' API."""
    config(tmp_path)
    pods = pod_commands("train/recipes/gke.yaml", tmp_path)
    assert [f"--processes={len(pods)}" in command for command in pods] == [True, True]
    out, error = finish(*(start(*command, KUBERNETES_SERVICE_HOST="none") for command in pods))
    check_trained(out, tmp_path, expected)
    assert "Kubernetes environment" not in error


# --- decode/ ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Eight heads, for eight devices."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    return tiny_pair.write(folder, num_attention_heads=8, num_key_value_heads=8)


@pytest.fixture(scope="module")
def prompts(model) -> Path:
    path = model.parent / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": "a" * n}]} for n in range(1, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def options(model: Path, prompts: Path, output: Path) -> list[object]:
    words = ["--model", model, "--input", prompts, "--output", output]
    return [*words, "--batch-size", 2, "--max-new-tokens", 12]


@pytest.fixture(scope="module")
def answers(start, model, prompts) -> dict[str, str]:
    """Of one device, by the recipe for it: prompt -> answer."""
    output = model.parent / "one.jsonl"
    command = ("decode/recipes/one_gpu.sh", *options(model, prompts, output))
    out, _ = finish(start(*command, devices=1))
    assert json.loads(out)["answered"] == 3
    return read(output)


def read(path: Path) -> dict[str, str]:
    return {turns[0]["content"]: turns[1]["content"] for turns in read_conversations(path)}


def test_decode_gpu_node(model, answers) -> None:
    arguments = [*answers, "--model", str(model), "--max-new-tokens", "12"]
    out = tiny_pair.run_program("decode/recipes/gpu_node.py", *arguments)
    for prompt, answer in answers.items():
        assert f"> {prompt}\n{answer}\n" in out


def test_decode_tpu_slice(start, model, prompts, answers, tmp_path) -> None:
    command = options(model, prompts, tmp_path / "answers.jsonl")
    out, _ = on_tpu_hosts(start, "decode/recipes/tpu_slice.sh", *command)
    assert json.loads(out)["answered"] == 3
    assert read(tmp_path / "answers.jsonl") == answers


def test_decode_slurm(start, model, prompts, answers, tmp_path) -> None:
    output = tmp_path / "answers.jsonl"
    script = ("bash", "decode/recipes/slurm.sbatch", *options(model, prompts, output))
    out, _ = finish(start(*script, **slurm_job()))
    assert json.loads(out)["answered"] == 3
    assert read(output) == answers


def test_decode_gke(start, model, prompts, answers) -> None:
    commands = pod_commands("decode/recipes/gke.yaml", model.parent)
    assert commands[0] == commands[1]
    out, _ = on_tpu_hosts(start, *commands[0], "--max-new-tokens", 12)
    assert json.loads(out)["answered"] == 3
    assert read(model.parent / "answers.jsonl") == answers
