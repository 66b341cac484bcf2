#!/bin/bash
# Stop what up.sh started in a folder. Usage: down.sh FOLDER
folder=${1:?the folder given to up.sh}
for daemon in slurmd.n1 slurmd.n2 slurmctld munged; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")"
done
true
