#!/usr/bin/env bash
# Fine-tunes READ:  bash train_read.sh PRESET [flags of train_read.py]
#
#   bash train_read.sh mini                              READ-mini from assets/read-mini-base, minutes on two cores
#   bash train_read.sh read-7b-val --dataset_dir ./data          from the base that the preset names
#   NUM_PROCS=2 bash train_read.sh mini                  two processes, on GPUs or on a CPU
#   HOSTFILE=hosts bash train_read.sh read-13b-stage1    several nodes; a line of the file is `node1 slots=8`
#
# With several GPUs, with NUM_PROCS or HOSTFILE, the deepspeed launcher starts one process on each; else it is plain python.
# Nodes are reached by pdsh over ssh and share this folder (checkpoints too), the environment and the data. A file .deepspeed_env
# here or in your home names the network between them, a line each: GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=eth0. Without it,
# nodes whose name means 127.0.0.1 to themselves (see /etc/hosts) wait for each other until the start is given up.
# READ_RENDEZVOUS_S is how long that takes, 300 seconds unless it is set; MASTER_PORT is the port at which processes meet.
# Ctrl-C, SIGTERM and SIGUSR1 (SLURM: --signal=USR1@120) save and stop; --auto_resume goes on.
# `bash train_read.sh mini --help` lists the flags, model/presets.py what each preset sets. Paths count from here.
set -euo pipefail
cd "$(dirname "$0")"

preset=${1:?usage: bash train_read.sh PRESET [flags]}
seen=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)}
read -ra gpus <<<"${seen//[,$'\n']/ }"
procs=${NUM_PROCS:-${#gpus[@]}}
launch=(python)
if [ "$procs" -gt 1 ] || [ -n "${HOSTFILE:-}" ]; then
  launch=(python -m deepspeed.launcher.runner --master_port "${MASTER_PORT:-29500}")
  trap '' INT  # Ctrl-C reaches the processes of the run, which save; the launcher waits until they have
fi
if [ -n "${HOSTFILE:-}" ]; then
  launch+=(--hostfile "$HOSTFILE")
elif [ "${#gpus[@]}" -eq 0 ]; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
  if [ "$procs" -gt 1 ]; then launch+=(--num_gpus "$procs"); fi
else  # the launcher keeps to these, unless --num_gpus is given: then it would take the first of the machine
  CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:0:procs}")
  export CUDA_VISIBLE_DEVICES
fi

exec "${launch[@]}" train_read.py --preset "$preset" "${@:2}"
