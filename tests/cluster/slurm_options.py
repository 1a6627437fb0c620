"""The long options of Slurm's commands and of pyxis, from their manual pages (Slurm 22.05): those with a
value, and those without."""

from __future__ import annotations

import re

_BOTH = """account acctg-freq bb bbf begin chdir cluster-constraint clusters comment constraint container core-spec
cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input
job-name licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodelist nodes
ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition power prefer
priority profile qos reservation signal sockets-per-node switches thread-spec threads-per-core time time-min tmp uid
wckey"""
_BOTH_FLAGS = """contiguous help hold overcommit oversubscribe quiet reboot spread-job test-only usage use-min-nodes
verbose version"""
_BOTH_OPTIONAL = "exclusive nice no-kill propagate"

VALUE = {
    "sbatch": f"{_BOTH} array batch export export-file kill-on-invalid-dep nodefile wait-all-nodes wrap",
    "srun": f"""{_BOTH} accel-bind bcast-exclude cpu-bind epilog export het-group jobid mpi msg-timeout nodefile prolog
    relative slurmd-debug task-epilog task-prolog threads wait
    container-image container-mounts container-workdir container-name container-save container-env""",
    "scancel": "account clusters jobname name nodelist partition qos reservation sibling signal state user wckey",
    "squeue": """account clusters format iterate jobs licenses name nodelist partition qos reservation sort states user
    users""",
    "scontrol": "clusters",
}
FLAG = {
    "sbatch": f"{_BOTH_FLAGS} get-user-env ignore-pbs no-requeue parsable requeue wait",
    "srun": f"""{_BOTH_FLAGS} disable-status exact label multi-prog no-allocate overlap preserve-env pty
    quit-on-interrupt unbuffered
    container-mount-home no-container-mount-home container-remap-root no-container-remap-root container-entrypoint
    no-container-entrypoint container-writable container-readonly""",
    "scancel": "batch ctld full help hurry interactive me quiet usage verbose version",
    "squeue": """all array array-unique federation help hide local long me noconvert noheader priority start steps usage
    verbose version""",
    "scontrol": "all details help hide local oneliner quiet verbose version",
}
OPTIONAL = {  # with a value or without one
    "sbatch": _BOTH_OPTIONAL,
    "srun": f"{_BOTH_OPTIONAL} bcast compress immediate kill-on-bad-exit resv-ports send-libs x11",
}
FORMS = {  # of the values that these scripts give
    "signal": r"((R|B|RB|BR):)?[A-Z0-9]+(@\d+)?",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
    "dependency": r"(afterok|afterany|afternotok|after):\d+(:\d+)*",
    "mem": r"\d+[KMGT]?",
    "nodes": r"\d+(-\d+)?",
    "open-mode": r"append|truncate",
    "kill-on-invalid-dep": r"yes|no",
    "exclusive": r"user|mcs",
    "cpu-bind": r"(quiet,|verbose,)?(none|rank|sockets|cores|threads|ldoms|map_cpu:.*|mask_cpu:.*)",
}


class Refused(Exception):
    """What the command would not take."""


def parse(program: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options and the words after them. Refused for what the command does not know."""
    options: dict[str, str] = {}
    words = list(words)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise Refused(f"{program}: {word}: the scripts use long options")
        if name in VALUE[program].split():
            if not equals:
                raise Refused(f"{program}: option '--{name}' requires an argument")
        elif name in FLAG[program].split():
            if equals:
                raise Refused(f"{program}: option '--{name}' doesn't allow an argument")
        elif name not in OPTIONAL.get(program, "").split():
            raise Refused(f"{program}: unrecognized option '--{name}'")
        if name == "signal" and program == "scancel":
            form = r"[A-Z0-9]+"
        else:
            form = FORMS.get(name, ".*")
        if equals and not re.fullmatch(form, value):
            raise Refused(f"{program}: invalid --{name} specification '{value}'")
        options[name] = value
    return options, words


def in_script(text: str) -> list[str]:
    """The words of a job script's #SBATCH lines, which end at its first command."""
    words = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words += line.removeprefix("#SBATCH").split("#")[0].split()
        elif line.strip() and not line.startswith("#"):
            break
    return words
