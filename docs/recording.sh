#!/usr/bin/env bash
# Shows the command at work: prints what a terminal would show while mounts and
# files of a private mount namespace change. Each step waits for its line, and
# fails if that does not come.
#
#	bash docs/recording.sh > docs/recording.txt
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${RECORDING:-}" ]; then
	RECORDING=$(mktemp -d)
	export RECORDING
	trap 'rm -rf "$RECORDING"' EXIT
	go build -o "$RECORDING/kernstream" ./cmd/kernstream
	as_root=()
	[ "$(id -u)" -eq 0 ] || as_root=(--user --map-root-user)
	PATH="$RECORDING:$PATH" unshare "${as_root[@]}" --mount --propagation private bash "$0"
	exit
fi

# watch shows and starts a command whose lines the steps wait for.
watch() {
	printf '$ %s &\n' "$*"
	coproc WATCH { exec "$@" 2>&1; }
}

# line reads the next line.
line() {
	if ! IFS= read -r -t 60 -u "${WATCH[0]}" text; then
		echo "recording.sh: no line came" >&2
		exit 1
	fi
}

# step shows and runs a command line, and prints the line that comes of it.
step() {
	printf '$ %s\n' "$1"
	eval "$1"
	line
	printf '%s\n' "$text"
}

# end ends what watch started.
end() {
	kill "$WATCH_PID"
	wait "$WATCH_PID" 2>/dev/null || true
	echo
}

mount -t tmpfs -o size=1m demo /mnt
mkdir /mnt/data /mnt/archive

# The table comes first; of it, only the last line is worth showing.
watch kernstream mounts
text=
while [[ $text != "+ /mnt "* ]]; do line; done
printf '...\n%s\n' "$text"
step "mount -t tmpfs -o size=64k scratch /mnt/data"
step "mount -o remount,ro /mnt/data"
step "mount --move /mnt/data /mnt/archive"
step "umount /mnt/archive"
end

# It says nowhere that it has begun, so something is done until it sees that.
echo draft >/mnt/data/letter
watch kernstream files -events close_write,create,delete,rename,ondir /mnt/data
probes=0
until IFS= read -r -t 0.2 -u "${WATCH[0]}" text; do ln -s x "/mnt/data/.probe$((probes += 1))"; done
ln -s x /mnt/data/.begun
while [[ $text != *.begun ]]; do line; done
step "echo a line >> /mnt/data/letter"
step "mkdir /mnt/data/sent"
step "mv /mnt/data/letter /mnt/data/sent.txt"
step "rm /mnt/data/sent.txt"
end
