#!/usr/bin/env bash
# A real Slurm of one node and two CPUs, all of it in one folder: its configuration, keys, state and logs.
#
#   tests/cluster/slurm.sh start DIR     then: export SLURM_CONF=DIR/slurm.conf
#   tests/cluster/slurm.sh stop DIR
#
# As root, with Debian's packages: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# Partitions: `main`, whose jobs those of `urgent` preempt (they are requeued), and `short`, of one minute.
# Nothing is accounted (no slurmdbd), so that sacct refuses, as it does on such a cluster.
set -euo pipefail

usage() {
	sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
	exit 2
}

[ $# -eq 2 ] || usage
DIR=$(realpath -m "$2")
CONF=$DIR/slurm.conf

missing() {
	for program in munged slurmctld slurmd sbatch; do
		command -v "$program" >/dev/null || echo "$program"
	done
}

wait_for() { # SECONDS WHAT COMMAND...
	local until=$((SECONDS + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -gt $until ]; then
			echo "slurm.sh: $what: see $DIR" >&2
			tail -n 5 "$DIR"/*.log >&2 || true
			exit 1
		fi
		sleep 0.2
	done
}

node_is_idle() { [ "$(sinfo --noheader --partition main --format %T)" = idle ]; }

start() {
	if [ -n "$(missing)" ]; then
		echo "slurm.sh: not installed: $(missing | xargs)" >&2
		exit 1
	fi
	[ "$(id -u)" = 0 ] || { echo "slurm.sh: only root can start slurmd" >&2; exit 1; }
	mkdir -p "$DIR/state" "$DIR/spool"
	chmod 755 "$DIR"
	install -d -o munge -g munge -m 700 "$DIR/key"
	install -d -o munge -g munge -m 755 "$DIR/munge"
	dd if=/dev/urandom of="$DIR/key/munge.key" bs=128 count=1 status=none
	chown munge:munge "$DIR/key/munge.key"
	chmod 600 "$DIR/key/munge.key"
	local ports
	ports=$(python3 -c '
import socket
open_ones = [socket.socket() for _ in range(2)]
for one in open_ones:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in open_ones))')
	cat >"$CONF" <<-CONFIGURATION
		ClusterName=toolmem
		SlurmctldHost=$(hostname -s)(127.0.0.1)
		SlurmUser=root
		SlurmctldPort=${ports% *}
		SlurmdPort=${ports#* }
		AuthType=auth/munge
		AuthInfo=socket=$DIR/munge/socket
		CredType=cred/munge
		StateSaveLocation=$DIR/state
		SlurmdSpoolDir=$DIR/spool
		SlurmctldPidFile=$DIR/slurmctld.pid
		SlurmdPidFile=$DIR/slurmd.pid
		SlurmctldLogFile=$DIR/slurmctld.log
		SlurmdLogFile=$DIR/slurmd.log
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		SelectType=select/cons_tres
		SelectTypeParameters=CR_CPU
		SlurmdParameters=config_overrides
		SchedulerParameters=sched_min_interval=0
		MpiDefault=none
		ReturnToService=2
		JobRequeue=1
		KillWait=10
		PreemptType=preempt/partition_prio
		PreemptMode=REQUEUE
		NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
		PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
		PartitionName=short Nodes=ALL MaxTime=1 OverTimeLimit=0 PriorityTier=1
		PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
	CONFIGURATION
	# munged ends a daemon's parent only when the socket is there
	setpriv --reuid munge --regid munge --clear-groups munged \
		--key-file "$DIR/key/munge.key" --socket "$DIR/munge/socket" --pid-file "$DIR/munge/munged.pid" \
		--log-file "$DIR/munge/munged.log" --seed-file "$DIR/munge/munged.seed"
	slurmctld -f "$CONF"
	slurmd -f "$CONF" -N "$(hostname -s)"
	export SLURM_CONF=$CONF
	wait_for 60 "the node does not come up" node_is_idle
}

stop() {
	export SLURM_CONF=$CONF
	scancel --user root 2>/dev/null || true
	for _ in $(seq 100); do # the daemons are what ends jobs
		[ -n "$(squeue --noheader 2>/dev/null)" ] || break
		sleep 0.2
	done
	for name in slurmd slurmctld munge/munged; do
		local file=$DIR/$name.pid pid
		[ -s "$file" ] || continue
		pid=$(cat "$file")
		kill "$pid" 2>/dev/null || true
		for _ in $(seq 50); do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.1
		done
		kill -9 "$pid" 2>/dev/null || true
	done
}

case $1 in
start) start ;;
stop) stop ;;
*) usage ;;
esac
