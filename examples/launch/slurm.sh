#!/bin/bash
# Two nodes under SLURM: sbatch examples/launch/slurm.sh. Nodes may have unlike GPUs, and unlike numbers of them.
#SBATCH --job-name=autoaccum
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node gpu --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29400" --rdzv-id "$SLURM_JOB_ID" \
  examples/elastic.py run.pt
