#!/bin/bash
# Start a SLURM of two nodes on this host: no systemd, no cgroups, no accounting. Root only.
# Usage: up.sh FOLDER; then: export SLURM_CONF=FOLDER/slurm.conf
# Needs: apt-get install --no-install-recommends slurm-wlm munge
set -eu
folder=${1:?a folder for state and logs}
mkdir -p "$folder"/state "$folder"/spool.n1 "$folder"/spool.n2
chmod 755 "$folder"
(umask 077; head -c 128 /dev/urandom > "$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=20
SlurmdParameters=config_overrides
SchedulerParameters=requeue_setup_env_fail
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmdLogFile=$folder/slurmd.%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[16821-16822] CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -i -f "$SLURM_CONF"
for node in n1 n2; do slurmd -N "$node" -f "$SLURM_CONF"; done
for _ in $(seq 60); do
    [ "$(sinfo -h -o %t | sort -u)" = idle ] && exit 0
    sleep 0.5
done
echo "up.sh: the nodes are not idle after 30 s; see $folder/slurmd.n1.log" >&2
exit 1
