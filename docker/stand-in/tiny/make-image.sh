#!/bin/bash
# make-image.sh TAG: the tiny stand-in image (a test double) on the engine of DOCKER_HOST, without an image registry.
# The root file system is unpacked from this machine's Debian packages (apt-get download, dpkg-deb: no root, no maintainer
# scripts) and kept in $WARM_CACHE_STAND_IN_CACHE (default ~/.cache/warm-cache-stand-in); the fake packages are laid over it.
# Where the tag already holds exactly this, nothing is done. DOCKER names the command-line client (default: docker).
set -eEuo pipefail
trap 'echo "make-image.sh: failed at line $LINENO: $BASH_COMMAND" >&2' ERR
tag=${1:?usage: make-image.sh TAG}
here=$(dirname "$(readlink -f "$0")")
cache=${WARM_CACHE_STAND_IN_CACHE:-$HOME/.cache/warm-cache-stand-in}
docker=${DOCKER:-docker}
packages="libc6 libgcc-s1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1 libcrypt1 libsqlite3-0 libncursesw6
libtinfo6 libreadline8 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib media-types busybox-static tini"

key=$( (cd "$here" && find . -type f ! -name '*.pyc' ! -name README.md -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) | sha256sum | cut -c1-16)
if [ "$("$docker" image inspect -f '{{index .Config.Labels "io.sglang.warm-cache.stand-in.key"}}' "$tag" 2>/dev/null)" = "$key" ]; then
	exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$cache"
base=$cache/tiny-base-compiled-$(echo "$packages" | sha256sum | cut -c1-16).tar
exec 9>"$cache/tiny.lock"
flock 9 # one builder per cache
if [ ! -e "$base" ]; then
	root=$work/base
	mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/{tmp,proc,sys,dev,etc,root,run,var/tmp} "$work/debs"
	for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done # the merged /usr that the packages expect
	(cd "$work/debs" && chmod 755 . "$work" && apt-get -q -o APT::Sandbox::User=root download $packages >/dev/null)
	for deb in "$work"/debs/*.deb; do
		dpkg-deb --fsys-tarfile "$deb" | tar -C "$root" -x --keep-directory-symlink \
			--exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
	done
	ln -s python3.11 "$root/usr/bin/python3"
	ln -s python3 "$root/usr/bin/python"
	for applet in $("$root/bin/busybox" --list); do [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"; done
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'root:x:0:' >"$root/etc/group"
	chmod 1777 "$root/tmp" "$root/var/tmp"
	# What Debian does when it configures the packages; without it, every start of Python in a container compiles them.
	# Of use where this machine has the same version of Python, and harmless elsewhere.
	python3 -m compileall -q -s "$root" -p / -x '/(lib2to3|pydoc_data|distutils)/' "$root/usr/lib/python3.11" >/dev/null
	tar -C "$root" --sort=name --numeric-owner --owner=0 --group=0 -cf "$base.tmp" .
	mv "$base.tmp" "$base"
fi

over=$work/over
site=$over/usr/local/lib/python3.11/dist-packages
mkdir -p "$site" "$over/usr/local/cuda/bin" "$over/sgl-workspace"
python3 "$here/assemble.py" "$work/site"
cp -r "$work/site/." "$site/"
install -m 755 "$here/nvcc" "$over/usr/local/cuda/bin/nvcc"
cp "$base" "$work/root.tar"
# Files alone, and the one folder that the base has not: an engine refuses an archive that names a folder twice.
(cd "$over" && find . -type f -o -name sgl-workspace) | LC_ALL=C sort |
	tar -C "$over" --no-recursion --numeric-owner --owner=0 --group=0 -T - -rf "$work/root.tar"
"$docker" import -m "test double: tiny stand-in $key" \
	-c 'LABEL io.sglang.warm-cache.test-double=tiny' -c "LABEL io.sglang.warm-cache.stand-in.key=$key" \
	-c 'LABEL ai.sglang.build.commit=0000000000000000000000000000000000000000' \
	-c 'ENV PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
	-c 'ENV CUDA_HOME=/usr/local/cuda' -c 'ENV PYTHONDONTWRITEBYTECODE=1' \
	-c 'WORKDIR /sgl-workspace' -c 'CMD ["python3"]' "$work/root.tar" "$tag" >/dev/null
