#!/bin/bash
# Makes a real Kubernetes 1.20.2 (API server, controllers, scheduler, kubelet) of Debian 12's own source package and its Go.
#
#   build.sh [DIR]   (default: kubernetes/ of the stand-ins' cache) prints the directory with the four programs
#
# No package of Debian, PyPI or npm has them as programs. Once for a machine: eight to nine minutes of CPU time, 2 GB of
# space that is freed again, 400 MB that stay. 1.20 has Job, DaemonSet and CronJob (v1beta1), and knows neither
# podFailurePolicy nor image volumes: schemas are what these are checked with.
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
. "$HERE/../packages.sh"

DIR=${1:-${WARM_CACHE_STAND_IN_CACHE:-$HOME/.cache/warm-cache-stand-in}/kubernetes}
PROGRAMS="kube-apiserver kube-controller-manager kube-scheduler kubelet"
mkdir -p "$DIR"
DIR=$(readlink -f "$DIR")
exec 8>"$DIR.lock"
flock 8
if [ -e "$DIR/kubelet" ]; then echo "$DIR"; exit; fi
[ "$(. /etc/os-release; echo "$VERSION_CODENAME")" = bookworm ] || fail "this is for Debian 12 (bookworm)"
install_packages /usr/lib/go-1.19/bin/go:golang-1.19-go rsync:rsync jq:jq make:make dpkg-source:dpkg-dev
SITE=$(apt-get indextargets --format '$(SITE)' | grep -m1 '/debian/*$') || fail "apt has no Debian mirror"
WORK=$(mktemp -d "$DIR.XXXXXX")
trap 'chmod -R u+w "$WORK"; rm -rf "$WORK"' EXIT
cd "$WORK"
# A private apt, which knows source packages and touches nothing of the machine's own.
mkdir -p lists/partial archives/partial
: >status   # nothing is installed: downloads need no dependencies
KEY=signed-by=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'deb [%s] %s bookworm main\ndeb-src [%s] %s bookworm main\n' "$KEY" "$SITE" "$KEY" "$SITE" >sources.list
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$WORK/sources.list" -o Dir::Etc::sourceparts=/nonexistent -o "Dir::State=$WORK"
  -o "Dir::State::lists=$WORK/lists" -o "Dir::State::status=$WORK/status" -o "Dir::Cache=$WORK" -o "Dir::Cache::archives=$WORK/archives"
  -o APT::Sandbox::User=root)
"${apt[@]}" update >&2 || fail "apt-get update failed"
"${apt[@]}" source kubernetes >/dev/null || fail "apt-get source kubernetes failed"
# reflect2 1.0.1 reads Go's maps in a way that Go 1.18 changed: the API server dies of SIGSEGV. Debian packages 1.0.2.
"${apt[@]}" download golang-github-modern-go-reflect2-dev >/dev/null
dpkg-deb -x golang-github-modern-go-reflect2-dev*.deb reflect2
cd kubernetes-*/
rm -f vendor/github.com/modern-go/reflect2/*.{go,s}
cp ../reflect2/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} vendor/github.com/modern-go/reflect2/
# As debian/rules builds kubectl: GOPATH's layout, vendored modules, nothing from a network.
export GOPATH=$PWD/.go GOCACHE=$WORK/gocache GOPROXY=off GOFLAGS='' CGO_ENABLED=0 PATH=/usr/lib/go-1.19/bin:$PATH HOME=$WORK
export KUBE_GIT_VERSION_FILE=$WORK/version
cat >"$KUBE_GIT_VERSION_FILE" <<'VERSION'
KUBE_GIT_COMMIT='debian'
KUBE_GIT_TREE_STATE='archive'
KUBE_GIT_VERSION='v1.20.2'
KUBE_GIT_MAJOR='1'
KUBE_GIT_MINOR='20'
VERSION
mkdir -p .go/src/k8s.io
[ -e .go/src/k8s.io/kubernetes ] || ln -s ../../.. .go/src/k8s.io/kubernetes
# shellcheck disable=SC2086
make WHAT="$(printf 'cmd/%s ' $PROGRAMS)" >"$DIR/build.log" 2>&1 || { tail -n 15 "$DIR/build.log" >&2; fail "the build failed; its log is $DIR/build.log"; }
for name in $PROGRAMS; do cp "_output/bin/$name" "$DIR/$name.new"; done
for name in $PROGRAMS; do mv "$DIR/$name.new" "$DIR/$name"; done   # kubelet, the last, says that all are there
echo "$DIR"
