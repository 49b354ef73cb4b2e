#!/bin/sh
# Runs in a chroot of the new image, in network, mount and process namespaces of its own. A dockerd that lives
# for a moment leaves two things in /build:
#   docker/                  its folder with the image busybox:latest, so that no VM ever has to load it
#   docker-default.apparmor  the profile of its containers, compiled, so that no VM has to compile it
set -eu
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /sys
# In memory: overlay2 needs a file system that can be below an overlay, which the host's need not be.
mkdir -p /var/lib/docker /var/lib/containerd
mount -t tmpfs -o mode=0710 tmpfs /var/lib/docker
mount -t tmpfs tmpfs /var/lib/containerd

# The busybox of the container image is Debian's busybox-static.
container=/run/busybox
mkdir -p $container/bin $container/etc $container/root $container/tmp
chmod 1777 $container/tmp
cp /bin/busybox $container/bin/busybox
chroot $container /bin/busybox --install -s /bin
echo 'root:x:0:0:root:/root:/bin/sh' >$container/etc/passwd
echo 'root:x:0:' >$container/etc/group

# dockerd sees a kernel with AppArmor and no profile loaded, whatever the host has, and asks the parser to load
# its profile; the parser compiles it for the kernel features that Debian's policy is written for.
mkdir -p /sys/fs/cgroup /sys/kernel/security/apparmor /sys/module/apparmor/parameters
mount -t cgroup2 cgroup2 /sys/fs/cgroup
: >/sys/kernel/security/apparmor/profiles
echo Y >/sys/module/apparmor/parameters/enabled
cp /usr/sbin/apparmor_parser /run/parser
cat >/run/fake-parser <<'END'
#!/bin/sh
[ "$1" != --version ] || exec /run/parser --version
for profile; do :; done
exec /run/parser --skip-kernel-load --skip-cache --policy-features /usr/share/apparmor-features/features \
	--kernel-features /usr/share/apparmor-features/features --ofile /build/docker-default.apparmor "$profile"
END
chmod +x /run/fake-parser
mount --bind /run/fake-parser /usr/sbin/apparmor_parser

# systemd-socket-activate says when it listens; from then on the client waits for dockerd by itself.
mkfifo /run/says
exec 3<>/run/says
systemd-socket-activate -l /run/docker.sock /usr/sbin/dockerd -H fd:// --bridge=none --iptables=false 2>/run/says &
daemon=$!
read -r _ <&3
cat <&3 >/run/dockerd.log &
give_up() {
	kill $daemon 2>/dev/null || true
	tail -n 20 /run/dockerd.log >&2
	exit 1
}
tar -C $container -c . |
	docker import -m 'busybox-static of Debian' -c 'CMD ["sh"]' \
		-c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - busybox:latest || give_up
[ "$(docker info --format '{{.Driver}}')" = overlay2 ] || give_up
[ -s /build/docker-default.apparmor ] || give_up
kill $daemon
wait $daemon || true
rm -rf /build/docker
cp -a /var/lib/docker /build/docker
# Only the image stays: every VM makes networks and the rest by itself.
cd /build/docker
rm -rf buildkit containerd network plugins runtimes swarm tmp trust engine-id
rm -f /etc/docker/key.json
