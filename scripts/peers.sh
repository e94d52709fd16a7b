#!/bin/sh
# Install the programs that only some tests and benchmarks need: curl, other load generators, the servers fastdist is
# compared with, Prometheus' promtool, a browser, debootstrap for bare systems, and clang for fuzzing. They are Debian
# packages; elsewhere, or without the right to install, those tests are skipped. Log daemons are unpacked into build/peers,
# not installed: a system has one of them at most, and keeps it. Clients for Node go to build/node where there is npm.
set -u
cd "$(dirname "$0")/.."

# Unpack what these packages and their dependencies lack on this system.
unpack() {
	folder=$(mktemp -d)
	mkdir "$folder/partial"
	if apt-get -qq -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder" -o APT::Sandbox::User="$(id -un)" \
		install -y --no-install-recommends --download-only "$@" >"$folder/log" 2>&1; then
		for file in "$folder"/*.deb; do
			[ ! -e "$file" ] || dpkg -x "$file" build/peers
		done
	else
		tail -n 5 "$folder/log" >&2
		echo "peers: no $1; tests that need it are skipped" >&2
		made=
	fi
	rm -rf "$folder"
}

daemons() {
	if command -v apt-get >/dev/null && [ ! -e build/peers/.made ]; then
		echo "peers: unpacking syslog-ng and rsyslog into build/peers"
		mkdir -p build/peers
		made=build/peers/.made
		unpack syslog-ng-core syslog-ng-mod-http
		unpack rsyslog rsyslog-elasticsearch
		[ -z "$made" ] || touch "$made"
	fi
}

node_clients() {
	command -v npm >/dev/null || return 0
	if [ ! -e build/node/.made ] || [ tests/e2e/node/package.json -nt build/node/.made ]; then
		echo "peers: installing clients for Node into build/node"
		mkdir -p build/node
		cp tests/e2e/node/package.json build/node
		if npm install --prefix build/node --no-audit --no-fund --ignore-scripts --loglevel=error >&2; then
			touch build/node/.made
		else
			echo "peers: they could not be installed; tests that need them are skipped" >&2
		fi
	fi
}

trap 'daemons; node_clients' EXIT # they need no root, but after apt-get update there is more to be had

missing=
for pair in curl:curl wrk:wrk ab:apache2-utils nginx:nginx haproxy:haproxy promtool:prometheus \
	chromium:chromium chromedriver:chromium-driver debootstrap:debootstrap; do
	program=${pair%%:*}
	# Servers are in sbin, which is not on every user's path.
	PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing="$missing ${pair#*:}"
done
# Any version of clang does, but it needs its own libFuzzer.
if ! ls /usr/lib/llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer_no_main-* >/dev/null 2>&1; then
	missing="$missing clang libclang-rt-dev"
fi
if [ -z "$missing" ]; then
	echo "peers: curl, wrk, ab, nginx, haproxy, promtool, chromium, debootstrap and clang are there; nothing to do"
	exit 0
fi

if ! command -v apt-get >/dev/null; then
	echo "peers: missing:$missing; this is no Debian, install them by other means" >&2
	exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
	if ! sudo -n true 2>/dev/null; then
		echo "peers: missing:$missing; installing needs root, or sudo without a password" >&2
		exit 1
	fi
	as_root=sudo
fi

echo "peers: installing$missing"
log=$(mktemp)
# Installed, not started: the tests start servers of their own. A machine with such a file keeps the one it has.
policy=/usr/sbin/policy-rc.d
[ -e "$policy" ] && policy=
if [ -n "$policy" ]; then
	printf "#!/bin/sh\nexit 101\n" | $as_root tee "$policy" >/dev/null && $as_root chmod 755 "$policy"
fi
if $as_root apt-get -qq update >"$log" 2>&1 &&
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $missing >>"$log" 2>&1; then
	status=0
	echo "peers: done"
else
	status=1
	tail -n 5 "$log" >&2
	echo "peers: could not be installed; tests that need them are skipped" >&2
fi
[ -z "$policy" ] || $as_root rm -f "$policy"
rm -f "$log"
exit $status
